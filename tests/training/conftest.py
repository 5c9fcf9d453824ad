"""Fixtures of this room's tests."""

import pytest

from helpers.ddp_gradients import (
    mimic_trainer,
    sharpened,
)
from helpers.mimic_trainer_cases import TERMS


@pytest.fixture
def models(make_student):
    """`models(moe_layers)`: a new student and a dense teacher of other weights."""

    def make(moe_layers=(0, 2)):
        return sharpened(make_student(moe_layers=moe_layers, seed=0)), sharpened(make_student(moe_layers=[], seed=1))

    return make


@pytest.fixture
def trainer_of(processor, tmp_path):
    """`trainer_of(student, teacher, **arguments)`: `mimic_trainer` in a temporary folder."""
    return lambda student, teacher, **args: mimic_trainer(student, teacher, processor, tmp_path, **{**TERMS, **args})
