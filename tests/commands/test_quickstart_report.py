"""What the quickstart says of its figures: in the terminal, beside the pictures, on the page."""

import re

import pytest

from llava_mod_hf.commands import quickstart_report as report
from llava_mod_hf.data.scene_rows import load

STAGES = ("adapt", "mimic_dense", "mimic_sparse", "prefer", "sft")


@pytest.fixture(scope="module")
def rows():
    return load("mixture", "test", 0, {"rows": 300})


@pytest.fixture(scope="module")
def given(rows):
    """Supervised students always say yes, and describe the first picture; the others are right."""
    right, first = rows["answer"][:], next(a for a, k in zip(rows["answer"], rows["kind"], strict=True) if "desc" in k)
    wrong = [
        {"describe": first}.get(kind, "yes" if "presence" in kind else answer)
        for kind, answer in zip(rows["kind"], right, strict=True)
    ]
    return {name: wrong if name in ("sft", "blind") else right for name in (*STAGES, "teacher", "blind")}


@pytest.fixture
def summary(rows, given):
    def result():
        run = {"steps": 4, "seconds": 1.0, "first_loss": 3.0, "last_loss": 1.0, "language_params_active": 200_000}
        return {"exact_match": 1.0, **run}

    found = {
        "world": "scenes", "seed": 3, "num_questions": len(rows), "seconds": 90.0,
        "training_rows": {"wrong_answers": 0.3}, "teacher": result(), "blind": result(),
        "stages": {name: result() for name in STAGES},
        "make_preferences": {"prompts": 10, "rows": 9, "seconds": 1.0},
        "published": {"folder": "runs/hub", "expert_load": {0: [0.5, 0.5]}},
    }  # fmt: skip
    found["stages"]["sft"]["exact_match"] = 0.5
    report.add_intervals(found, rows, given)
    return found


def test_the_terminal_has_80_columns(summary, tmp_path, capsys):
    report.show(summary, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["%", *report.COLUMNS.values()]
    names = [re.split(r"\s+\d", line)[0] for line in lines[2:8]]
    assert names == ["blind", "teacher", "supervised", "distilled dense", "distilled", "preferred"]
    assert lines[3].split() == ["teacher", *["100±0.0"] * 5, "0.0±0.0", "100±0.0"]
    difference = next(line for line in lines if line.startswith("hallucinated descriptions"))
    assert "−" in difference and difference.split()[-3:] == ["+0.0", "[+0.0,", "+0.0]"]


def test_the_page_says_which_differences_are_sure_and_which_are_gains(summary, tmp_path):
    said = report._page(summary, tmp_path)
    verdicts = {name: [verdict for _, _, verdict in cells] for name, cells in said["differences"]}
    assert verdicts["right answers, all questions"] == ["better", ""]
    assert verdicts["hallucinated descriptions ↓"] == ["better", ""]
    summary["differences"] = {
        name: {measure: tuple(-each for each in (value[0], value[2], value[1])) for measure, value in entry.items()}
        for name, entry in summary["differences"].items()
    }
    said = report._page(summary, tmp_path)
    verdicts = {name: [verdict for _, _, verdict in cells] for name, cells in said["differences"]}
    assert verdicts["right answers, all questions"] == ["worse", ""]
    assert verdicts["hallucinated descriptions ↓"] == ["worse", ""]
    assert said["wrong_answers"] == "30 %" and str(tmp_path / "sft") in [each["folder"] for each in said["checkpoints"]]
    assert said["finding"] == "100 % right when distilled, 50 % when trained on the labels"


def test_a_measure_without_a_question_is_left_out(summary, rows, given, tmp_path, capsys):
    few = [number for number, kind in enumerate(rows["kind"]) if kind != "count"][:40]
    only = rows.select([number for number in few if "presence" not in rows["kind"][number]])
    kept = [number for number in few if "presence" not in rows["kind"][number]]
    report.add_intervals(summary, only, {name: [each[n] for n in kept] for name, each in given.items()})
    report.show(summary, tmp_path)
    head = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("%"))
    assert head.split() == ["%", "all", "descr.", "absent↓", "found"]
    assert "how many?" not in [name for name, _ in report._page(summary, tmp_path)["measures"]]


def test_the_examples_are_the_first_on_which_they_differ(rows, given):
    chosen = report.examples(rows, given)
    described = [number for number, kind in enumerate(rows["kind"]) if kind == "describe"]
    differ = [number for number in described if given["sft"][number] != given["teacher"][number]]
    assert chosen == differ[:4] and described[0] not in chosen
    same = {name: given["teacher"] for name in given}
    assert report.examples(rows, same) == described[:4]


@pytest.mark.parametrize(
    ("given", "right", "note"),
    [
        ("a red circle and a blue square", True, ""),
        ("a blue square, a red circle and a red circle", False, "names red circle again"),
        ("a green circle and a red circle", False, "misses blue square"),
        ("", False, "misses red circle, blue square"),
    ],
)
def test_a_line_says_what_is_missing(given, right, note):
    line = report._line("sft", given, "a red circle and a blue square")
    assert (line.name, line.right, line.note) == ("supervised", right, note)


def test_three_missing_things_are_not_listed():
    line = report._line("prefer", "none", "a red circle, a blue square and a green triangle")
    assert line.note == "misses all three"
