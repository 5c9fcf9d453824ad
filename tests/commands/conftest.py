"""Fixtures of the commands' tests."""

import pytest
from transformers import LlamaForCausalLM

from helpers.ddp_gradients import sharpened


@pytest.fixture(scope="module")
def folders(make_student, processor, tmp_path_factory):
    """Folders of a dense student, of a teacher and of a language model."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 0), ("teacher", 1)):
        sharpened(make_student(moe_layers=[], seed=seed)).save_pretrained(root / name)
        processor.save_pretrained(root / name)
    LlamaForCausalLM(make_student(moe_layers=[]).config.text_config).save_pretrained(root / "language_model")
    processor.tokenizer.save_pretrained(root / "language_model")
    return {path.name: str(path) for path in root.iterdir()}
