"""One file a command: its options, and a short `run`."""
