"""What is read of a run's folder: of a finished one, of one that goes on, and of what is none."""

import json

import pytest

from llava_mod_hf.training.run_history import read_run
from llava_mod_hf.training.run_lines import add_lines

LOGS = [{"step": 2, "epoch": 0.1, "loss": 2.0}, {"step": 4, "epoch": 0.2, "loss": 1.0, "eval_loss": None, "kl": 0.5}]


def write(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def test_a_finished_run_is_what_its_run_json_says(tmp_path):
    write(tmp_path / "run.json", steps=4, log_history=LOGS, recipe={"seed": 1})
    write(tmp_path / "checkpoint-9" / "trainer_state.json", global_step=9, max_steps=9, log_history=[])
    run = read_run(tmp_path)
    assert (run.steps, run.max_steps, run.finished["recipe"]) == (4, None, {"seed": 1})
    assert run.curves() == {"loss": [(2, 2.0), (4, 1.0)], "kl": [(4, 0.5)]}
    assert (run.routers, run.examples) == ([], [])


def test_of_one_that_goes_on_the_last_checkpoint_counts_and_lines_after_it_do_not(tmp_path):
    for step in (2, 10, 4):
        logs = [{**LOGS[0], "loss": float(step)}]
        write(tmp_path / f"checkpoint-{step}" / "trainer_state.json", global_step=step, max_steps=20, log_history=logs)
    for name in ("router.jsonl", "examples.jsonl"):
        add_lines(tmp_path / name, [{"step": step} for step in (4, 10, 11)])
    run = read_run(str(tmp_path))
    assert (run.steps, run.max_steps, run.finished) == (10, 20, {})
    assert run.curves()["loss"] == [(2, 10.0)]
    assert run.routers == run.examples == [{"step": 4}, {"step": 10}]
    one = read_run(tmp_path / "checkpoint-4")  # whose lines are beside it
    assert one.curves()["loss"] == [(2, 4.0)]
    assert one.routers == [{"step": 4}]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none` is no folder: give the `output_dir` of a run"):
        read_run(tmp_path / "none")
    with pytest.raises(ValueError, match="is no run: it has no run.json, and no checkpoint with a trainer_state.json"):
        read_run(tmp_path)
    write(tmp_path / "adapt" / "run.json", log_history=LOGS)
    with pytest.raises(ValueError, match=f"is no run: .*; give one of {tmp_path}/adapt."):
        read_run(tmp_path)
    write(tmp_path / "silent" / "run.json", log_history=[])
    with pytest.raises(ValueError, match="silent` is of a run that logged nothing"):
        read_run(tmp_path / "silent")
    for text, message in (('{"steps": 4', r"run.json` is cut off or damaged"), ("[1]", "run.json` holds a list")):
        (tmp_path / "silent" / "run.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_run(tmp_path / "silent")
