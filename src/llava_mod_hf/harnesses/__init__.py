"""Tasks and models for the harnesses that others trust, lm-eval and lmms-eval, scored by our own metrics."""
