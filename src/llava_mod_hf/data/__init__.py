"""Published rows become checked rows of TRL."""
