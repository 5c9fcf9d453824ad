"""The benchmark of conversations: one pass reads what the authors' does, and a row for each answer a multiple."""

import runpy
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "multi_turn.py"


def test_one_pass_reads_no_more_than_the_authors():
    found = runpy.run_path(str(BENCHMARK))["measure"](conversations=40, seed=0)
    assert found["supervised"] == 40 * found["answers"]
    assert found["whole"][0] == pytest.approx(found["authors"][0])
    assert found["expand"][0] > 3 * found["whole"][0]
    assert found["whole"][0] < found["whole"][1] < found["expand"][1]
