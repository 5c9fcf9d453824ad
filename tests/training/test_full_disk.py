"""A disk that is full while a checkpoint is written: told in a sentence, and the last whole one is taken up."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerState

from helpers.ddp_gradients import mimic_trainer
from llava_mod_hf.training.checkpoints import last_complete_checkpoint
from llava_mod_hf.training.run_recipe import RECIPE_FILE

FULL = OSError(errno.ENOSPC, "No space left on device")
OPTIONS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}


def full(write, is_second):
    """A writer that finds the disk full at the second checkpoint."""

    def writes(first, *args, **kwargs):
        if is_second(first, *args):
            raise FULL
        return write(first, *args, **kwargs)

    return writes


def half(content, path, **kwargs):
    """Of whose file there is room for half."""
    path = Path(path)
    SAVE(content, path, **kwargs)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SAVE = torch.save

# what is written first, in the middle and last
WRITERS = {
    "weights": (Trainer, "_save"),
    "optimiser": (Trainer, "_save_optimizer_and_scheduler"),
    "random numbers": (Trainer, "_save_rng_state"),
    "state": (TrainerState, "save_to_json"),
}


@pytest.mark.parametrize("part", ["half of a file", *(pytest.param(part, marks=pytest.mark.slow) for part in WRITERS)])
def test_the_last_whole_checkpoint_stays_and_is_taken_up(make_student, processor, tmp_path, monkeypatch, part):
    def trainer(folder):
        torch.manual_seed(0)
        students = make_student(seed=0), make_student(moe_layers=[], seed=1)
        return mimic_trainer(*students, processor, folder, **OPTIONS)

    with monkeypatch.context() as patch:
        if part in WRITERS:
            owner, name = WRITERS[part]
            write = full(getattr(owner, name), lambda each, *_: getattr(each, "state", each).global_step == 2)
            patch.setattr(owner, name, write)
        else:

            def is_second(content, path, *_):
                if "checkpoint-2" in str(path):
                    half(content, path)
                return "checkpoint-2" in str(path)

            patch.setattr(torch, "save", full(torch.save, is_second))
        folder = tmp_path / "run"
        told = (
            rf"`{folder}/checkpoint-2` could not be written \(.*No space left on device\): make room, and start again"
        )
        with pytest.raises(OSError, match=told):
            trainer(folder).train()
    first = folder / "checkpoint-1"
    assert last_complete_checkpoint(folder) == str(first) and (first / RECIPE_FILE).is_file()
    resumed = trainer(folder)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    trainer(tmp_path / "whole").train()
    found, expected = (load_file(tmp_path / name / "checkpoint-3" / "model.safetensors") for name in ("run", "whole"))
    assert all(found[name].equal(value) for name, value in expected.items())
