"""A conversation with a model: its turns, and answers as they come."""
