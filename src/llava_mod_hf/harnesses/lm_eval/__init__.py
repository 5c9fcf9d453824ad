"""The task folder of lm-eval: `lm-eval run --include_path` of it."""
