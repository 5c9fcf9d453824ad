"""What one sees of a run: a bar on a terminal, lines elsewhere, and the same figures in both."""

import io
import itertools
import re
import sys
from types import SimpleNamespace

import pytest
from transformers import PrinterCallback, ProgressCallback

from helpers.ddp_gradients import mimic_trainer, rows, sharpened
from helpers.trainers import TRAINERS
from llava_mod_hf.training import progress
from llava_mod_hf.training.progress import Bar, Clock, Lines

STEPS = {"batch": 2, "max_steps": 4, "logging_steps": 2, "learning_rate": 1e-3, "disable_tqdm": False}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "test_split_size": 2, "per_device_eval_batch_size": 2}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def run(make_student, processor, tmp_path, capsys):
    """`run(name, **options)`: the trainer of a run of four steps; what is captured is of the run alone."""

    def make(name, **args):
        student, teacher = (sharpened(make_student(moe_layers=[], seed=seed)) for seed in (0, 1))
        trainer = TRAINERS[name](student, teacher, processor, tmp_path, **{**STEPS, **args})
        capsys.readouterr()
        trainer.train()
        return trainer

    return make


def losses(trainer):
    return [logs for logs in trainer.state.log_history if "loss" in logs]


def told(logs):
    """The figures of a log as they are shown."""
    kl = f"kl {logs['kl']:.4g}, " if "kl" in logs else ""
    rate = f"{logs['tokens_per_second']:,.0f} tokens/s"
    return f"loss {logs['loss']:.4g}, {kl}lr {logs['learning_rate']:.2e}, {rate}"


@pytest.mark.parametrize("name", TRAINERS)
def test_without_a_terminal_each_log_is_a_line(run, capsys, name):
    trainer = run(name)
    found = capsys.readouterr()
    assert "\r" not in found.err and "{" not in found.out
    first, last = losses(trainer)
    assert ("kl" in first) == (name == "mimic")
    lines = [line for line in found.err.splitlines() if line.startswith("step ")]
    assert re.fullmatch(r"0:\d\d:\d\d left", lines[0].removeprefix(f"step 2/4: {told(first)}, "))
    assert lines[1:] == [f"step 4/4: {told(last)}, 0:00:00 left"]


def test_on_a_terminal_there_is_one_bar_with_the_last_figures(run, monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    trainer = run("mimic", eval_answers=2, **EVALUATED)
    drawn = terminal.getvalue()
    first, last = losses(trainer)
    for logs in (first, last):
        assert f" left, {told(logs)}]" in drawn
    assert "| 4/4 [00:00 left" in drawn
    assert "Flattening" not in drawn
    for step in (2, 4):
        (logs,) = (logs for logs in trainer.state.log_history if "eval_loss" in logs and logs["step"] == step)
        line = f"step {step}: eval_loss {logs['eval_loss']:.4g}, eval_exact_match {logs['eval_exact_match']:.4g}, "
        assert line in drawn
    assert capsys.readouterr().out == ""


def test_evaluations_are_lines_too_without_what_they_cost(run, capsys):
    trainer = run("prefer", eval_answers=1, **EVALUATED)
    found = capsys.readouterr().err
    assert "\r" not in found and "Generating answers" not in found
    (line,) = (line for line in found.splitlines() if line.startswith("step 4: "))
    (logs,) = (logs for logs in trainer.state.log_history if "eval_loss" in logs and logs["step"] == 4)
    shown = dict(figure.rsplit(" ", 1) for figure in line.removeprefix("step 4: ").split(", "))
    assert shown["eval_loss"] == f"{logs['eval_loss']:.4g}"
    assert not [name for name in shown if "/" in name or "runtime" in name or "second" in name or "tokens" in name]


def test_disable_tqdm_has_lines_on_a_terminal(run, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run("mimic", disable_tqdm=True)
    assert "step 2/4: loss " in terminal.getvalue()
    assert "| 2/4" not in terminal.getvalue()


def test_a_callback_that_is_given_is_left(make_student, processor, tmp_path):
    class Own(ProgressCallback):
        pass

    student, teacher = (make_student(moe_layers=[], seed=seed) for seed in (0, 1))
    trainer = mimic_trainer(student, teacher, processor, tmp_path, callbacks=[Own()], disable_tqdm=False)
    kinds = [type(each) for each in trainer.callback_handler.callbacks]
    shown = [kind for kind in kinds if issubclass(kind, PrinterCallback | ProgressCallback)]
    assert shown == [Own, Lines]


@pytest.mark.parametrize("name", TRAINERS)
def test_tokens_per_second_are_those_of_the_batches(run, monkeypatch, name):
    monkeypatch.setattr(Clock, "take", lambda self: 2.0)
    trainer = run(name, max_steps=2, logging_steps=1, dataset=None)
    data = rows("preferences") if name == "prefer" else rows()
    for number, logs in enumerate(losses(trainer)):
        batch = trainer.data_collator([data[2 * number], data[2 * number + 1]])
        assert logs["tokens_per_second"] == int(batch["attention_mask"].sum()) / 2


def test_the_clock_stands_still_while_it_is_evaluated_and_saved(monkeypatch):
    now = itertools.count()  # each look is a second later
    times = []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: times[-1] if times else next(now))
    clock = Clock()

    def at(time, event):
        times[:] = [time]
        return event()

    events = (None, None, None)
    at(10.0, lambda: clock.on_train_begin(*events))
    at(13.0, lambda: clock.on_step_end(*events))
    assert at(13.0, clock.take) == 3.0
    at(20.0, lambda: clock.on_evaluate(*events))  # seven seconds
    at(25.0, lambda: clock.on_save(*events))  # five more
    at(26.0, lambda: clock.on_step_end(*events))
    at(28.0, lambda: clock.on_step_end(*events))
    assert at(28.0, clock.take) == 3.0


def test_a_resumed_run_counts_its_own_steps(monkeypatch):
    state = SimpleNamespace(is_world_process_zero=True, global_step=90, max_steps=100)
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar, lines = Bar(), Lines()
    times = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: times[0])
    for callback in (bar, lines):
        callback.on_train_begin(None, state, None)
    assert (bar.training_bar.n, bar.training_bar.initial) == (90, 90)
    state.global_step, times[0] = 92, 60.0
    bar.on_step_end(None, state, None)
    assert bar.training_bar.n == 92
    bar.on_train_end(None, state, None)
    lines.on_log(None, state, None, {"loss": 1.0})  # half a minute a step, eight to go
    assert "step 92/100: loss 1, 0:04:00 left\n" in sys.stderr.getvalue()
