"""Stages that a signal ends: with a checkpoint and a code of their own, to be taken up with the same end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from helpers.ddp_gradients import mimic_trainer
from helpers.stages import ARGUMENTS, adapt, mimic, prefer
from llava_mod_cli import main
from llava_mod_hf.training.adapt_trainer import AdaptTrainer
from llava_mod_hf.training.interruption import EXIT_CODE, SIGNALS, RunInterrupted
from llava_mod_hf.training.mimic_trainer import MimicTrainer
from llava_mod_hf.training.preference_trainer import PreferenceTrainer

STAGES = {"adapt": (adapt, AdaptTrainer), "mimic": (mimic, MimicTrainer), "prefer": (prefer, PreferenceTrainer)}
STEPS = 150  # of a run that is long enough to be met within
SAVING = {"max_steps": 3, "save_strategy": "no", "train_sampling_strategy": "random"}


class Sends(TrainerCallback):
    """Sends this process a signal within a step."""

    def __init__(self, number, step=2):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def sending(monkeypatch):
    """`sending(trainer, number, step)`: its runs get the signal, until `undo`."""

    def send(trainer, *args):
        make = trainer.__init__

        def init(self, *given, **kwargs):
            make(self, *given, **kwargs)
            self.add_callback(Sends(*args))

        monkeypatch.setattr(trainer, "__init__", init)

    send.undo = monkeypatch.undo
    return send


def losses(run):
    return [entry["loss"] for entry in run["log_history"] if "loss" in entry]


# one signal of each stage is fast enough for every run
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, id=number.name, marks=[pytest.mark.slow] * bool(place))
        for place, number in enumerate(SIGNALS)
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_to_the_same_end(folders, tmp_path, sending, stage, number):
    run, trainer = STAGES[stage]
    sending(trainer, number)
    with pytest.raises(RunInterrupted) as caught:
        run(folders, tmp_path / "run", **SAVING)
    assert caught.value.code == EXIT_CODE == 75
    told = (
        f"{number.name} came, and the run stopped after step 2 of 3 with the checkpoint `{tmp_path}/run/checkpoint-2`"
    )
    assert str(caught.value) == f"{told}: start it again as it was, and it goes on from there."
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2"]  # neither model nor run.json
    assert all(signal.getsignal(each) == signal.SIG_DFL for each in SIGNALS)
    sending.undo()
    found, expected = (run(folders, tmp_path / name, **SAVING) for name in ("run", "whole"))
    assert losses(found) == losses(expected) and len(losses(found)) == 3
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(found[name].equal(value) for name, value in expected.items())


def test_a_signal_in_the_last_step_lets_the_run_end(folders, tmp_path, sending):
    sending(MimicTrainer, signal.SIGTERM, 3)
    assert mimic(folders, tmp_path, **SAVING)["steps"] == 3
    assert (tmp_path / "run.json").is_file()


def test_who_handles_a_signal_himself_keeps_it(make_student, processor, tmp_path):
    heard = []
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        trainer = mimic_trainer(make_student(), make_student(moe_layers=[]), processor, tmp_path, max_steps=2)
        trainer.add_callback(Sends(signal.SIGUSR1))
        trainer.train()
        assert heard == [signal.SIGUSR1] and trainer.state.global_step == 2
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def recipe(folders, tmp_path, **values):
    options = {name: value for name, value in ARGUMENTS.items() if name != "hub_token"}
    options |= {"dataset_name": "embedded:easy-vqa", "dataset_config": "mixture", "max_samples": 8}
    options |= {"student": folders["student"], "teacher": folders["teacher"], **SAVING, **values}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in options.items() if value is not None}))
    return str(path)


def test_the_command_line_says_so_and_ends_with_its_code(folders, tmp_path, sending, capsys):
    sending(MimicTrainer, signal.SIGTERM)
    path = recipe(folders, tmp_path, output_dir=str(tmp_path / "run"))
    assert main(["mimic", "--config", path]) == EXIT_CODE
    assert capsys.readouterr().err.splitlines()[-1].startswith("llava-mod mimic: SIGTERM came, and the run stopped")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_that_is_sent_a_signal(folders, tmp_path, processes):
    """From outside; of two processes one alone hears it, and both stop at the same step."""
    path = recipe(folders, tmp_path, max_steps=STEPS, ddp_backend="gloo" if processes > 1 else None)
    start = [sys.executable, "-m", "llava_mod_cli"]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29671"]
        start += ["-m", "llava_mod_cli"]

    def launch(name):
        arguments = [*start, "mimic", "--config", path, "--output_dir", str(tmp_path / name)]
        return subprocess.Popen(arguments, stderr=(tmp_path / f"{name}.log").open("w"))

    process = launch("run")
    while (one := listener(process.pid)) is None and process.poll() is None:
        time.sleep(0.05)
    os.kill(one, signal.SIGUSR1)
    process.wait(timeout=120)
    assert "came, and the run stopped after step" in (tmp_path / "run.log").read_text()
    assert process.returncode == (EXIT_CODE if processes == 1 else 1)  # torchrun has a code of its own
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    for name in ("run", "whole"):
        assert launch(name).wait(timeout=300) == 0
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "whole")]
    assert losses(runs[0]) == losses(runs[1]) and len(losses(runs[0])) == STEPS
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(found[name].equal(value) for name, value in expected.items())


def listener(pid):
    """A process of this launch that listens to SIGUSR1, if there is one yet."""
    for each in (pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{each}/status").read_text().splitlines())
        if int(status["SigCgt"], 16) >> (signal.SIGUSR1 - 1) & 1:
            return each
    return None
