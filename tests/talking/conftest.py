"""Fixtures of the tests of talking."""

import pytest
from PIL import Image

from llava_mod_hf.loading import load_model_and_processor


@pytest.fixture(scope="session")
def teacher():
    """`(model, processor)` of the embedded teacher, whose answers have ends."""
    return load_model_and_processor("embedded:tiny-teacher")


@pytest.fixture
def picture():
    """A picture of 64 by 64 pixels."""
    return Image.new("RGB", (64, 64), (200, 30, 30))
