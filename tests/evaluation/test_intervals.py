"""Figures counted row by row, and their intervals over the questions."""

import random

import pytest

from helpers.scenes import described
from llava_mod_hf.data.scene_rows import load
from llava_mod_hf.evaluation.intervals import figures, intervals
from llava_mod_hf.evaluation.measures import score


def test_figures_by_hand():
    found = figures(
        [
            {"question": "d", "answer": "a red circle and a blue square", "kind": "describe", "given": "a red circle"},
            {"question": "d", "answer": "a red circle", "kind": "describe", "given": "a red circle and a red square"},
            {"question": "p", "answer": "no", "kind": "presence (adversarial)", "given": "No."},
            {"question": "p", "answer": "no", "kind": "presence (random)", "given": "yes"},
            {"question": "c", "answer": "two", "kind": "count", "given": "two"},
        ]
    )
    assert found == {
        "exact_match": 2 / 5, "chair_s": 1 / 2, "chair_i": 1 / 3, "object_recall": 2 / 3, "object_f1": 4 / 6,
        "describe": 0.0, "presence": 1 / 2, "adversarial": 1.0, "random": 0.0, "count": 1.0,
    }  # fmt: skip


def test_the_figures_are_those_of_evaluate():
    """Counted row by row here, for the bootstrap, and by the metrics there."""
    asked = load("mixture", "test", 0, {"rows": 300})
    rng = random.Random(0)
    given = [rng.choice([answer, "yes", "a red circle and a blue square"]) for answer in asked["answer"]]
    columns = {"references": asked["answer"][:], "questions": asked["question"][:], "kinds": asked["kind"][:]}
    expected = score(predictions=given, **columns)
    found = figures(
        [
            dict(zip(("question", "answer", "kind", "given"), row, strict=True))
            for row in zip(columns["questions"], columns["references"], columns["kinds"], given, strict=True)
        ]
    )
    for name in ("exact_match", "chair_s", "chair_i", "object_recall"):
        assert found[name] == expected[name]
    for sort in ("random", "popular", "adversarial"):
        assert found[sort] == expected["pope"][f"presence ({sort})"]["accuracy"]
    for kind in ("describe", "count", "where", "conversation"):
        assert found[kind] == expected["exact_match_by_kind"][kind]


def test_the_interval_of_a_share_is_as_wide_as_the_normal_one():
    value, low, high = intervals(described(0.8))["exact_match"]
    assert value == figures(described(0.8))["exact_match"]
    assert low < value < high
    assert high - low == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 400) ** 0.5, rel=0.15)


def test_the_interval_of_a_difference_is_as_wide_as_the_normal_one():
    first, second = described(0.8, 1), described(0.6, 2)
    difference, low, high = intervals(first, second)["exact_match"]
    assert difference == pytest.approx(figures(first)["exact_match"] - figures(second)["exact_match"])
    assert low < difference < high
    assert high - low == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 400 + 0.6 * 0.4 / 400) ** 0.5, rel=0.15)


def test_differences_are_paired():
    """Two models that are right and wrong together differ for sure, however few questions they were asked."""
    first = described(0.5)
    second = [{**row} for row in first]
    for row in second[:20]:
        row["given"] = "a red square"
    assert intervals(first, first)["chair_s"] == (0, 0, 0)
    _, low, high = intervals(first, second)["exact_match"]
    assert low > 0 and high - low < 0.04


def test_a_ratio_is_resampled_by_questions():
    """Of two things in each description none or both are found: as if half as many things had been looked for."""
    answer = "a red circle and a blue square"
    rng = random.Random(0)
    both = [
        {"question": "d", "answer": answer, "kind": "describe", "given": rng.choice([answer, "a green circle"])}
        for _ in range(400)
    ]
    _, low, high = intervals(both)["object_recall"]
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 400) ** 0.5, rel=0.15)


def test_seed_and_resamples_are_the_bootstraps():
    some = described(0.5, count=50)
    assert intervals(some) == intervals(some, seed=0, resamples=2000) != intervals(some, seed=1)
    assert intervals(some, resamples=20) != intervals(some)


def test_other_questions_or_none_are_refused():
    with pytest.raises(ValueError, match="asked different questions"):
        intervals(described(0.5), described(0.5)[:-1])
    with pytest.raises(ValueError, match="no answers to measure"):
        intervals([])
