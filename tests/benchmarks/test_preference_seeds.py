"""The table over seeds: means, paired differences and intervals, from files that are there."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "preference_seeds.py"
FIGURES = ("hallucination_rate", "miss_rate", "balanced_accuracy", "exact_match")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("preference_seeds", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_interval_is_students(script):
    mean, half_width = script.interval([0.1, 0.2, 0.4])
    deviation = math.sqrt(sum((x - 0.7 / 3) ** 2 for x in (0.1, 0.2, 0.4)) / 2)
    assert mean == pytest.approx(0.7 / 3)
    assert half_width == pytest.approx(4.303 * deviation / math.sqrt(3))
    assert script.interval([0.5]) == (0.5, None)


def test_the_page_has_means_and_paired_differences(script, tmp_path, monkeypatch, capsys):
    models = {"blind": [0.5, 0.5], "teacher": [0.02, 0.04], "before": [0.3, 0.2]}
    models |= {"teacher margin": [0.2, 0.12], "chosen": [0.25, 0.19]}
    logged = {"loss": 0.5, "margins/below": 0.25}
    for seed in range(2):
        values = {
            name: dict.fromkeys(FIGURES, column[seed]) | {"logged": logged if name == "teacher margin" else {}}
            for name, column in models.items()
        }
        options = {"steps": None, "num_questions": 1500}
        (tmp_path / f"seed-{seed}.json").write_text(json.dumps({"seed": seed, "options": options, "models": values}))
    argv = ["--seeds", "0", "1", "--results", str(tmp_path), "--only-table", "--variants", "teacher margin", "chosen"]
    monkeypatch.setattr(sys, "argv", ["preference_seeds.py", *argv])
    script.main()
    page = capsys.readouterr().out
    assert "| before | 25.0 ± 63.5 |" in page
    before, chosen, log = [line for line in page.splitlines() if line.startswith("| teacher margin |")][1:]
    assert before.startswith("| teacher margin | -9.0 ± 12.7 |")
    assert chosen.startswith("| teacher margin | -6.0 ± 12.7 |")
    assert log == "| teacher margin | 0.500 |  |  | 0.250 |  |  |"


def test_results_of_other_options_are_not_continued(script, tmp_path):
    (tmp_path / "seed-0.json").write_text(
        json.dumps({"seed": 0, "options": {"steps": 2, "num_questions": 60}, "models": {}})
    )
    args = type("Args", (), {"results": tmp_path, "steps": None, "num_questions": 1500, "variants": []})()
    with pytest.raises(SystemExit, match="was begun with"):
        script.run_seed(0, args)
