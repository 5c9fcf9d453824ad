"""Fixtures of this room's tests."""

import copy

import pytest

from helpers import tiny
from helpers.ddp_gradients import TERMS, mimic_trainer, sharpened
from helpers.preference_trainers import preference_trainer


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


@pytest.fixture
def pair_trainer_of(processor, tmp_path):
    def make(student, teacher, *, processor=processor, **args):
        return preference_trainer(student, teacher, processor, tmp_path, **args)

    return make


@pytest.fixture
def other_processor(tokenizer):
    """Fewer image tokens, another image size and another template, over the same tokenizer."""
    template = (
        "{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    return tiny.make_processor(copy.deepcopy(tokenizer), image_size=32, chat_template=template)
