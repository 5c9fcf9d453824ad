"""The code that ships, flat, to the Hub with every checkpoint."""
