"""`llava-mod report`: the page and the picture of one run, and of several side by side."""

import base64
import json
import re

import pytest

from helpers.stages import mimic
from llava_mod_cli import main
from llava_mod_hf.commands.report import SHOWN
from llava_mod_hf.training.run_lines import add_lines

FIGURES = {"load": [0.75, 0.25], "max_load": 0.75, "load_entropy": 0.8113, "entropy": 0.5, "dead_experts": 0.5}
FIGURES["overloaded_experts"] = 0.25
PICTURE = {**FIGURES, "load": [1.0, 0.0], "load_entropy": 0.0}
ROUTERS = {
    "layers": {
        "2": {
            **FIGURES,
            "by_modality": {"picture": PICTURE, "prompt": FIGURES},
            "by_task": {"<color>": FIGURES},
            "together": [[0.75, 0.0], [0.0, 0.25]],
            "distance": [0.125, 0.0625],
        }
    },
    "paths": {"distinct": 12, "most_frequent": [{"experts": [1, 0], "share": 0.25}]},
    "collapsed": [2],
}


def make_run(folder, *, loss=1.0, said="teal", lines=True, **recipe):
    """A finished run of ten steps, with what it leaves."""
    folder.mkdir(parents=True)
    logs = [{"step": step, "loss": loss + 1 / step, "num_tokens": 7.0 * step, "eval_runtime": 1.0} for step in (5, 10)]
    run = {"steps": 10, "seconds": 12.5, "seconds_per_step": 1.25, "log_history": logs, "recipe": recipe}
    (folder / "run.json").write_text(json.dumps(run))
    if lines:
        add_lines(folder / "router.jsonl", [{"step": step, "tokens": 8, "layers": {"2": FIGURES}} for step in (5, 10)])
        row = {"set": "eval", "question": "what <color>?", "answer": "teal"}
        add_lines(folder / "examples.jsonl", [{"step": 5, **row, "prediction": "early"}])
        add_lines(folder / "examples.jsonl", [{"step": 10, **row, "prediction": text} for text in (said, "& red")])
    return folder


def rows(page):
    """The rows of all tables, as the words of their cells."""
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]


def test_a_run_is_reported_in_its_folder(tmp_path, capsys):
    folder = make_run(tmp_path / "student", seed=3)
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "://" not in page  # nothing is loaded
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert base64.b64decode(picture) == (folder / "report.png").read_bytes()
    found = rows(page)
    for row in (
        ["steps", "10"],
        ["seconds", "12.5"],
        ["loss", "1.1"],
        ["num_tokens", "70"],
        ["seed", "3"],
        ["student", "2", "75.0, 25.0", "0.8113", "0.5", "50", "25"],
        ["what &lt;color&gt;?", "teal", "teal"],
        ["what &lt;color&gt;?", "teal", "&amp; red"],
    ):
        assert row in found, row
    assert "early" not in page and "eval_runtime" not in page
    assert main(["report", "--runs", str(folder)]) == 0  # again


def test_several_runs_are_side_by_side(tmp_path):
    folders = [
        make_run(tmp_path / "one" / "student", seed=3, output_dir="one", lr=1e-3),
        make_run(tmp_path / "two" / "student", loss=2.0, said="blue", seed=4, output_dir="two", lr=1e-3),
        make_run(tmp_path / "dense", lines=False, seed=3, lr=1e-3),
    ]
    assert main(["report", *map(str, folders), "--output", str(tmp_path / "report")]) == 0
    assert not list(tmp_path.rglob("student/report*"))
    found = rows((tmp_path / "report" / "report.html").read_text())
    assert found[0] == ["", str(folders[0]), str(folders[1]), "dense"]
    assert ["loss", "1.1", "2.1", "1.1"] in found
    assert ["seed", "3", "4", "3"] in found
    assert not [row for row in found if row[0] in ("lr", "output_dir")]
    assert ["what &lt;color&gt;?", "teal", "teal", "blue", "–"] in found
    assert ["what &lt;color&gt;?", "teal", "&amp; red", "&amp; red", "–"] in found


def test_a_run_that_goes_on_tells_how_far_it_is(tmp_path):
    state = {"global_step": 10, "max_steps": 4000, "log_history": [{"step": 10, "loss": 0.123456}]}
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(json.dumps(state))
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "report")]) == 0
    found = rows((tmp_path / "report" / "report.html").read_text())
    assert found[1:] == [["steps", "10 of 4,000"], ["loss", "0.1235"]]


def routers_shown(folder, name):
    page = (folder / "report.html").read_text()
    pictures = [base64.b64decode(each) for each in re.findall(r'src="data:image/png;base64,([^"]*)"', page)]
    assert pictures[-1] == (folder / "report_routers.png").read_bytes()
    found = rows(page)
    for row in (
        [name, "2", "all", "75.0, 25.0", "0.8113", "0.5", "50", "25"],
        [name, "2", "picture", "100.0, 0.0", "0", "0.5", "50", "25"],
        [name, "2", "&lt;color&gt;", "75.0, 25.0", "0.8113", "0.5", "50", "25"],
        [name, "2", "12.5, 6.2", "collapsed"],
        [name, "1 → 0", "25.0%", "12"],
    ):
        assert row in found, row
    return len(pictures)


def test_measured_routers_are_shown_of_a_run_and_of_a_student_without_one(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "results.json").write_text(json.dumps({"student": {}, "routers": ROUTERS}))
    assert main(["report", str(folder)]) == 0
    assert routers_shown(folder, "run") == 2
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "results.json").write_text(json.dumps({"student": {}, "routers": ROUTERS}))
    assert main(["report", str(alone)]) == 0
    assert routers_shown(alone, "alone") == 1
    assert "Last numbers" not in (alone / "report.html").read_text() and not (alone / "report.png").exists()
    assert main(["report", str(folder), str(alone), "--output", str(tmp_path / "both")]) == 0
    assert routers_shown(tmp_path / "both", "alone") == routers_shown(tmp_path / "both", "run") == 2


def test_no_more_answers_are_shown_than_can_be_read(tmp_path):
    folder = make_run(tmp_path / "run", lines=False)
    lines = [
        {"step": 10, "set": "eval", "question": f"q{i}", "answer": "a", "prediction": "p"} for i in range(SHOWN + 3)
    ]
    add_lines(folder / "examples.jsonl", lines)
    main(["report", str(folder)])
    page = (folder / "report.html").read_text()
    assert len([row for row in rows(page) if row[1:] == ["a", "p"]]) == SHOWN
    assert f"{SHOWN} of {SHOWN + 3}" in page


def test_what_cannot_be_reported_is_refused_in_a_sentence(tmp_path, capsys):
    folder = str(make_run(tmp_path / "run"))
    other = str(make_run(tmp_path / "other"))
    (tmp_path / "file").write_text("")
    for argv, message in (
        ([], "There is no run to report on"),
        ([folder, folder], f"`{folder}` stands twice among the runs"),
        ([folder, other], "There are 2 runs: give the folder for their report as `output`."),
        ([folder, "--output", str(tmp_path / "file")], "which is a file: give a folder."),
        ([str(tmp_path)], f"`{tmp_path}` is no run: it has no run.json"),
    ):
        assert main(["report", *argv]) == 2
        error = capsys.readouterr().err
        assert f"llava-mod report: {message}" in error or message in error
        assert error.count("\n") == 1


@pytest.mark.slow
def test_what_a_stage_leaves_is_what_is_reported(folders, tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "test_split_size": 2, "eval_answers": 2}
    run = mimic(folders, tmp_path / "run", moe_layers=["alternate"], **evaluated)
    assert main(["report", str(tmp_path / "run")]) == 0
    found = rows((tmp_path / "run" / "report.html").read_text())
    last = [logs for logs in run["log_history"] if "loss" in logs][-1]
    for name in ("kl", "router/max_load"):
        assert [name, f"{last[name]:.4g}"] in found
    loads = [row for row in found if row[0] == "run" and row[1] in ("0", "2")]
    assert [row[1] for row in loads] == ["0", "2"]
    argv = ["--model", str(tmp_path / "run"), "--dataset_name", "embedded:easy-vqa", "--dataset_config", "mixture"]
    argv += ["--max_samples", "8"]
    assert main(["evaluate", *argv]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    (results, page) = ((tmp_path / "run" / name).read_text() for name in ("results.json", "report.html"))
    routers = json.loads(results)["routers"]
    assert routers["rows"] == 8 and json.loads(results)["expert_load"]["0"] == routers["layers"]["0"]["load"]
    for layer, figures in routers["layers"].items():
        for task, told in figures["by_task"].items():
            load = ", ".join(f"{100 * share:.1f}" for share in told["load"])
            assert any(row[:4] == ["run", layer, task, load] for row in rows(page))
    assert sum(row[1:] != ["expected", "run"] for row in found if len(row) == 3) == 2  # two answers
