"""The script of checks on a GPU, on a CPU: its table, its file and its exit code."""

import json
import runpy
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "gpu_check.py"))


def test_a_check_passes(script, tmp_path, capsys):
    assert script["main"](["--device", "cpu", "--only", "preference_losses", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["failed"] == 0 and report["machine"]["device"] == "cpu"
    assert {row["case"] for row in report["rows"]} >= {"kto_pair float32", "margin float16"}
    assert all(0 <= row["measured"] <= row["bound"] and row["passed"] for row in report["rows"])
    assert capsys.readouterr().out.count(" ok\n") == len(report["rows"])


def test_what_fails_does_not_stop_the_rest(script, tmp_path, capsys):
    def fail():
        raise RuntimeError("no such kernel")

    def skip():
        raise script["Skipped"]("not installed")

    cases = {
        "raises": fail,
        "exceeds": lambda: {"error": (0.2, 0.1)},
        "is no number": lambda: {"error": (float("nan"), 0.1)},
        "is skipped": skip,
        "is reported": lambda: {"seconds": 3.0},
    }
    script["CHECKS"]["attention"] = lambda device: cases.items()
    assert script["main"](["--device", "cpu", "--only", "attention", "--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert [row["passed"] for row in rows] == [False, False, False, None, None]
    assert "no such kernel" in rows[0]["measured"] and "no such kernel" in (tmp_path / "gpu_check.log").read_text()
    assert "3 failed" in capsys.readouterr().out


def test_it_ends_when_its_time_is_over_in_the_middle_of_a_case_too(script, tmp_path):
    script["CHECKS"]["attention"] = lambda device: {
        "in time": lambda: {"error": (0.0, 0.1)},
        "too long": lambda: time.sleep(30),
        "not begun": lambda: time.sleep(30),
    }.items()
    argv = ["--device", "cpu", "--only", "attention", "--minutes", "0.02", "--out", str(tmp_path)]
    began = time.perf_counter()
    assert script["main"](argv) == 0
    assert time.perf_counter() - began < 10
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert [(row["passed"], row["measured"]) for row in rows] == [(True, 0.0), *[(None, "no time left")] * 2]
