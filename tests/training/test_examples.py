"""Example answers: in the run's folder, and in the trackers that have tables; and the trackers themselves, offline."""

import json
import struct
import sys
from types import SimpleNamespace

import pytest
from transformers.integrations import TrackioCallback, WandbCallback

from helpers.ddp_gradients import rows, sharpened
from helpers.trainers import TRAINERS
from llava_mod_hf.training.examples import COLUMNS, SHOWN, keep_examples
from llava_mod_hf.training.run_lines import read_lines
from llava_mod_hf.training.validation import asked

EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2, "eval_answers": 2}
SAID = [f"said | {number}\nand" for number in range(4)]


@pytest.fixture
def trainer_of(make_student, processor, tmp_path, monkeypatch):
    """`trainer_of(name, **options)`: of two steps with an evaluation each, in which the student says `SAID`."""
    answers = iter([SAID[:2], SAID[2:]])
    monkeypatch.setattr("llava_mod_hf.training.validation.generate_answers", lambda *args, **kwargs: next(answers))

    def make(name, **args):
        student, teacher = (sharpened(make_student(moe_layers=[], seed=seed)) for seed in (0, 1))
        options = {"batch": 2, "max_steps": 2, "test_split_size": 2, **EACH_STEP, **args}
        return TRAINERS[name](student, teacher, processor, tmp_path, **options)

    return make


def expected(trainer):
    """The rows of the table, of both evaluations."""
    sample, _ = asked(trainer.eval_dataset, 2)
    texts = list(zip(sample["question"], sample["answer"], strict=True))
    return [[1 + number // 2, "eval", *texts[number % 2], said] for number, said in enumerate(SAID)]


@pytest.mark.parametrize("name", TRAINERS)
def test_questions_expected_answers_and_those_of_the_student_are_kept(trainer_of, tmp_path, name):
    trainer = trainer_of(name)
    trainer.train()
    lines = read_lines(tmp_path / "examples.jsonl")
    assert [list(line) for line in lines] == [list(COLUMNS)] * 4
    assert [list(line.values()) for line in lines] == expected(trainer)


def test_several_sets_are_told_apart(trainer_of, tmp_path):
    trainer = trainer_of("mimic")
    trainer.evaluate({"one": rows(count=2), "two": rows(count=6).select(range(4, 6))})
    assert [line["set"] for line in read_lines(tmp_path / "examples.jsonl")] == ["eval_one"] * 2 + ["eval_two"] * 2


# Trackers


class Tracker:
    """Stands in for `wandb` and `trackio`: what is logged to it while a run goes on."""

    def __init__(self, running=True):
        self.logged = []
        self.run = running or None
        self.context_vars = SimpleNamespace(current_run=SimpleNamespace(get=lambda: self.run))

    def Table(self, columns, data):
        return {"columns": columns, "data": data}

    def log(self, values):
        self.logged.append(values)


@pytest.mark.parametrize(("name", "kind"), [("wandb", WandbCallback), ("trackio", TrackioCallback)])
@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("running", [True, False])
def test_a_tracker_gets_a_table_of_the_first_rows_while_it_runs(tmp_path, monkeypatch, name, kind, main, running):
    tracker = Tracker(running)
    monkeypatch.setitem(sys.modules, name, tracker)
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path)),
        state=SimpleNamespace(global_step=7),
        callback_handler=SimpleNamespace(callbacks=[object.__new__(kind)]),
        is_world_process_zero=lambda: main,
    )
    count = SHOWN + 3
    sample = {"question": [f"q{i}" for i in range(count)], "answer": [f"a{i}" for i in range(count)]}
    predictions = [f"p{i}" for i in range(count)]
    for prefix in ("eval", "eval_other"):
        keep_examples(trainer, sample, predictions, prefix)
    assert len(read_lines(tmp_path / "examples.jsonl")) == (2 * count if main else 0)
    tables = [[[7, prefix, f"q{i}", f"a{i}", f"p{i}"] for i in range(SHOWN)] for prefix in ("eval", "eval_other")]
    names = ("examples", "examples/eval_other")
    logged = [
        {name: {"columns": list(COLUMNS), "data": table}, "train/global_step": 7}
        for name, table in zip(names, tables, strict=True)
    ]
    assert tracker.logged == (logged if main and running else [])


def events(folder):
    """The `(tag, step, value)` of TensorBoard's files: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in folder.rglob("events.out.tfevents.*"):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack("<Q", data[start : start + 8])
            event = Event.FromString(data[start + 12 : start + 12 + length])
            start += length + 16
            for value in event.summary.value:
                texts = [text.decode() for text in value.tensor.string_val]
                yield value.tag, event.step, texts[0] if texts else value.simple_value


def test_tensorboard_gets_the_figures_and_the_examples(trainer_of, tmp_path):
    pytest.importorskip("tensorboardX")
    trainer = trainer_of("mimic", report_to=["tensorboard"])
    trainer.train()
    found = list(events(tmp_path))
    for logs in trainer.state.log_history[:2]:
        for tag, name in (("train/kl", "kl"), ("eval/kl", "eval_kl")):
            if name in logs:
                assert (tag, logs["step"], pytest.approx(logs[name], rel=1e-5)) in found
    tables = {step: text for tag, step, text in found if tag.startswith("examples")}
    for step in (1, 2):
        shown = [row for row in expected(trainer) if row[0] == step]
        cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in shown]
        assert tables[step].splitlines()[2:] == ["| " + " | ".join(row) + " |" for row in cells]


def test_trackio_gets_the_figures_and_the_examples(trainer_of, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    trainer = trainer_of("mimic", report_to=["trackio"], project="watching", run_name="a-run")
    trainer.train()
    logged = SQLiteStorage.get_logs("watching", "a-run")
    kl = [entry["train/kl"] for entry in logged if "train/kl" in entry]
    assert kl == [pytest.approx(logs["kl"]) for logs in trainer.state.log_history if "kl" in logs]
    assert len([entry for entry in logged if "examples" in entry]) == 2


def test_wandb_gets_the_examples_offline(trainer_of, tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb = pytest.importorskip("wandb")
    trainer = trainer_of("mimic", report_to=["wandb"])
    trainer.train()
    wandb.finish()
    tables = [json.loads(path.read_text()) for path in tmp_path.rglob("media/table/examples*.table.json")]
    assert sorted(row for table in tables for row in table["data"]) == sorted(expected(trainer))
