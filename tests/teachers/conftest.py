"""Fixtures of this room's tests."""

import functools

import pytest
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from helpers.cached_teacher_cases import write
from helpers.ddp_gradients import sharpened
from llava_mod_hf.data import easy_vqa


@pytest.fixture(scope="module")
def student(make_student):
    return sharpened(make_student(moe_layers=[]))


@pytest.fixture(scope="module")
def collator(processor):
    return DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)


@pytest.fixture(scope="module")
def rows_read_once():
    """The embedded questions are balanced anew by every command: a second each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(easy_vqa, "load", functools.cache(easy_vqa.load))
        yield


@pytest.fixture(scope="module")
def models(make_student, make_teacher, processor, tmp_path_factory):
    """Folders of a student, of a teacher that reads the same tensors, and of one with its own images and template."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 0), ("teacher", 1), ("other", 2)):
        sharpened(make_student(moe_layers=[], seed=seed)).save_pretrained(root / name)
        processor.save_pretrained(root / name)
    model, teacher_processor = make_teacher()
    model.save_pretrained(root / "foreign")
    teacher_processor.save_pretrained(root / "foreign")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(scope="module")
def caches(models, tmp_path_factory):
    """Whole caches with the whole vocabulary, of either teacher."""
    root = tmp_path_factory.mktemp("caches")
    return {name: write(models, root / name, name) for name in ("teacher", "foreign")}
