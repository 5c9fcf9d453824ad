"""Stages that are interrupted, killed or damaged, and started again."""

import functools
import json
import signal
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file

from helpers import stages
from helpers.stages import StopsAt, adapt, mimic, prefer
from llava_mod_hf import MimicTrainer, PreferenceTrainer
from llava_mod_hf.commands import adapt as adapt_module
from llava_mod_hf.commands import mimic as mimic_module
from llava_mod_hf.commands import prefer as prefer_module
from llava_mod_hf.training.adapt_trainer import AdaptTrainer

SAVING = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "random"}
STAGES = {
    "adapt": (adapt, adapt_module, AdaptTrainer),
    "mimic": (mimic, mimic_module, MimicTrainer),
    "prefer": (prefer, prefer_module, PreferenceTrainer),
}


class Interrupted:
    """Runs a stage that stops at the end of a step, or with a callback that counts its steps."""

    def __init__(self, monkeypatch, folders, stage="mimic"):
        self.monkeypatch, self.folders = monkeypatch, folders
        self.run_stage, self.module, self.trainer = STAGES[stage]

    def run(self, folder, callback, **args):
        trainer = functools.partial(self.trainer, callbacks=[callback])
        self.monkeypatch.setattr(self.module, self.trainer.__name__, trainer)
        return self.run_stage(self.folders, folder, **{**SAVING, **args})

    def stop(self, folder, step=2, **args):
        with pytest.raises(InterruptedError):
            self.run(folder, StopsAt(step), **args)

    def steps_taken(self, folder, **args):
        callback = StopsAt()
        summary = self.run(folder, callback, **args)
        assert summary["steps"] == 3
        return callback.taken


@pytest.fixture
def interrupted(monkeypatch, folders):
    return Interrupted(monkeypatch, folders)


def test_a_run_is_not_taken_up_with_another_recipe(interrupted, tmp_path, monkeypatch):
    interrupted.stop(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    for changed, told in (
        ({"learning_rate": 1e-3}, "`learning_rate` was 0.01 and is 0.001"),
        ({"seed": 1, "max_steps": 4}, "`max_steps` was 3 and is 4, `seed` was 42 and is 1"),
    ):
        with pytest.raises(ValueError, match=told):
            interrupted.run(tmp_path, StopsAt(), **changed)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="`dataset_config` was 'mixture' and is 'q"):
        patch.setattr(stages, "data_arguments", functools.partial(stages.data_arguments, "questions"))
        interrupted.run(tmp_path, StopsAt())
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert interrupted.steps_taken(tmp_path, logging_steps=2, save_steps=2, dataloader_num_workers=0) == 2


def test_a_recipe_is_compared_with_that_of_the_checkpoint_alone(interrupted, tmp_path):
    interrupted.stop(tmp_path, learning_rate=1e-3)
    interrupted.stop(tmp_path, step=1, resume_from_checkpoint="false")  # another recipe's checkpoint stays
    with pytest.raises(ValueError, match=r"checkpoint-1` is of a run with other options: `learning_rate` was 0.001"):
        interrupted.run(tmp_path, StopsAt())


@pytest.mark.parametrize(
    "stage", ["mimic", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adapt", "prefer"))]
)
def test_where_a_run_begins_can_be_chosen_in_every_stage(monkeypatch, folders, tmp_path, stage):
    interrupted = Interrupted(monkeypatch, folders, stage)
    interrupted.stop(tmp_path / "first", step=3)
    first = str(tmp_path / "first" / "checkpoint-1")
    assert interrupted.steps_taken(tmp_path / "other", resume_from_checkpoint=first) == 2


def test_the_last_checkpoint_can_be_asked_for(interrupted, tmp_path):
    interrupted.stop(tmp_path, step=3)
    assert interrupted.steps_taken(tmp_path, resume_from_checkpoint="last") == 1


def test_a_run_can_begin_from_the_start_again(interrupted, tmp_path):
    interrupted.stop(tmp_path)
    assert interrupted.steps_taken(tmp_path, resume_from_checkpoint=False) == 3


@pytest.mark.parametrize(
    ("choice", "told"),
    [("true", "has no whole one"), ("nowhere/checkpoint-1", r"`nowhere/checkpoint-1`, which is no folder with")],
)
def test_a_checkpoint_that_is_not_there_is_refused_before_anything_is_loaded(folders, tmp_path, choice, told):
    with pytest.raises(ValueError, match=told):
        mimic({name: "nothing" for name in folders}, tmp_path, resume_from_checkpoint=choice)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(interrupted, tmp_path, caplog):
    interrupted.stop(tmp_path, step=3)
    damaged = tmp_path / "checkpoint-2" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    assert interrupted.steps_taken(tmp_path) == 2
    assert f"`{damaged}` is cut off or damaged" in caplog.text


def test_a_run_that_is_killed_in_its_final_save_ends_with_the_steps_it_had(interrupted, tmp_path, monkeypatch):
    save = MimicTrainer.save_model

    def killed(self, output_dir=None, _internal_call=False):
        save(self, output_dir, _internal_call)
        if "checkpoint-" not in str(output_dir):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MimicTrainer, "save_model", killed)
        interrupted.run(tmp_path / "run", StopsAt())
    assert not (tmp_path / "run" / "config.json").exists()
    assert interrupted.steps_taken(tmp_path / "run") == 0
    assert interrupted.steps_taken(tmp_path / "whole") == 3
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(found[name].equal(value) for name, value in expected.items())
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "run")]
    losses = [[entry["loss"] for entry in run["log_history"] if "loss" in entry] for run in runs]
    assert losses[0] == losses[1]


def test_what_a_killed_run_had_not_written_to_the_end_goes(interrupted, tmp_path):
    for name in (".unfinished", ".unfinished-push-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    (tmp_path / "config.json").write_text("{}")  # killed between this file and `run.json`
    interrupted.steps_taken(tmp_path)
    assert not list(tmp_path.glob(".unfinished*"))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llava_mod"


SCRIPT = """
import os, signal, sys
from transformers import ProcessorMixin
from llava_mod_cli import main
write = ProcessorMixin.save_pretrained
def killed(self, folder, *args, **kwargs):
    write(self, folder, *args, **kwargs)
    if "checkpoint-" not in str(folder):
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "kill":
    ProcessorMixin.save_pretrained = killed
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_in_its_final_save_leaves_nothing_that_stays(folders, tmp_path):
    options = {
        "student": folders["student"],
        "teacher": folders["teacher"],
        "dataset_name": "embedded:easy-vqa",
        "dataset_config": "mixture",
        "max_samples": 8,
        "output_dir": str(tmp_path),
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 12,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    (recipe := tmp_path.parent / "killed.yaml").write_text(yaml.safe_dump(options))
    codes = [
        subprocess.run([sys.executable, "-c", SCRIPT, mode, "mimic", "--config", str(recipe)]).returncode
        for mode in ("kill", "go on")
    ]
    assert codes == [-signal.SIGKILL, 0]
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 12
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "tmp"))]
