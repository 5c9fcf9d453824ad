"""Fixtures of this room's tests."""

import pytest

from helpers.models import QUESTIONS, image_batch, sharpen


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def text_model_type(request):
    return request.param


@pytest.fixture(scope="module")
def sparse(make_student, text_model_type):
    return sharpen(make_student(moe_layers=[0, 2], text_model_type=text_model_type))


@pytest.fixture(scope="module")
def batch(processor):
    return image_batch(processor, QUESTIONS)
