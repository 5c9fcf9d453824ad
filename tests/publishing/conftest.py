"""Fixtures of the tests of this room."""

import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.fixture
def folder(tmp_path):
    """The least that can be pushed, with one more file, in a subfolder."""
    folder = tmp_path / "student"
    (folder / "figures").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llava_mod"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Student\n")
    (folder / "figures" / "losses.png").write_bytes(b"\x89PNG" + bytes(100))
    save_file({"weight": np.arange(64, dtype=np.float32)}, folder / "model.safetensors")
    return folder
