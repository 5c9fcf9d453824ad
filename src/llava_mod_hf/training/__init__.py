"""The trainers, what they train, and the folder of a run."""
