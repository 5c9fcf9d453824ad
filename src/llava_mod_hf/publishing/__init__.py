"""From a checkpoint to one commit on the Hub."""
