"""Make, grow, convert and shrink a student."""
