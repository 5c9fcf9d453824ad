"""The measures, one file each, as metrics of `evaluate` that need no network."""
