"""Fixtures of this room's tests."""

import pytest
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from helpers.ddp_gradients import sharpened


@pytest.fixture(scope="module")
def student(make_student):
    return sharpened(make_student(moe_layers=[]))


@pytest.fixture(scope="module")
def collator(processor):
    return DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
