"""What both harnesses and `evaluate` are asked in the tests."""

TOKENS = 12  # of an answer

SCENES = {"dataset_name": "embedded:scenes", "dataset_config": "mixture", "dataset_options": {"rows": 8}}
