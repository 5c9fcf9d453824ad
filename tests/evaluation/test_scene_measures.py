"""CHAIR and POPE against plain counts, and where they apply."""

import random

import pytest

from llava_mod_hf.data.scene_rows import load
from llava_mod_hf.data.scenes import KINDS, caption
from llava_mod_hf.evaluation.answers import evaluate_blind
from llava_mod_hf.evaluation.measures import CaptionHallucination, Pope, score


def chair(predictions, references, kinds=None):
    kinds = kinds or ["describe"] * len(predictions)
    metric = CaptionHallucination(keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references, kinds=kinds)


def test_chair_by_hand():
    found = chair(
        ["A red circle, a red circle and a green square.", "", "a blue thing", "a blue square and a red circle"],
        ["a red circle", "a blue square", "a blue square and a red triangle", "a red circle and a blue square"],
    )
    # named: 2, 0, 0, 2, of which absent: 1, 0, 0, 0; present: 1, 1, 2, 2, of which found: 1, 0, 0, 2
    assert found == {"chair_s": 1 / 4, "chair_i": 1 / 4, "object_recall": 3 / 6}


def test_a_model_that_names_nothing_has_no_recall():
    assert chair(["", ""], ["a red circle", "a red square"]) == {"chair_s": 0.0, "chair_i": 0.0, "object_recall": 0.0}


def test_rows_of_another_kind_do_not_count():
    found = chair(["a red square", "a green circle"], ["a red square", "yes"], ["describe", "presence (random)"])
    assert found == {"chair_s": 0.0, "chair_i": 0.0, "object_recall": 1.0}


@pytest.fixture(scope="module")
def answered():
    """200 rows with answers that are right, wrong, and none of those."""
    rows, rng = load("mixture", "test", 1, {"rows": 200}), random.Random(0)

    def answer(row):
        if rng.random() < 0.4:
            return row["answer"].upper()
        if row["kind"] == "describe":
            return caption(rng.sample(KINDS, rng.randint(1, 4)))
        return rng.choice(["yes", "no", "perhaps", "a red circle"])

    return rows, [answer(row) for row in rows]


def test_both_equal_a_plain_count(answered):
    rows, given = answered
    columns = {"predictions": given, "references": list(rows["answer"]), "kinds": list(rows["kind"])}
    described = [
        ({k for k in KINDS if k in said.lower()}, {k for k in KINDS if k in right})
        for said, right, kind in zip(given, rows["answer"], rows["kind"], strict=True)
        if kind == "describe"
    ]
    found = CaptionHallucination(keep_in_memory=True).compute(**columns)
    assert len(described) > 40
    assert found["chair_s"] == sum(not said <= right for said, right in described) / len(described)
    assert found["chair_i"] == sum(len(s - r) for s, r in described) / sum(len(s) for s, _ in described)
    assert found["object_recall"] == sum(len(s & r) for s, r in described) / sum(len(r) for _, r in described)

    pope = Pope(keep_in_memory=True).compute(**columns)["pope"]
    assert sorted(pope) == ["presence (adversarial)", "presence (popular)", "presence (random)"]
    for sort, figures in pope.items():
        pairs = [
            (said.lower(), right)
            for said, right, kind in zip(given, rows["answer"], rows["kind"], strict=True)
            if kind == sort
        ]
        hits = sum(pair == ("yes", "yes") for pair in pairs)
        yes, present = (sum(pair[side] == "yes" for pair in pairs) for side in (0, 1))
        assert figures["accuracy"] == sum(said == right for said, right in pairs) / len(pairs)
        assert figures["yes"] == yes / len(pairs)
        assert figures["precision"] == pytest.approx(hits / yes)
        assert figures["recall"] == pytest.approx(hits / present)
        assert figures["f1"] == pytest.approx(2 * hits / (yes + present))


def test_pope_without_a_claim_has_no_precision():
    found = Pope(keep_in_memory=True).compute(
        predictions=["no", "no"], references=["yes", "no"], kinds=["presence (random)"] * 2
    )
    expected = {"accuracy": 0.5, "precision": None, "recall": 0.0, "f1": None, "yes": 0.0}
    assert found == {"pope": {"presence (random)": expected}}


@pytest.mark.parametrize(
    ("kind", "reference", "measured"),
    [
        ("describe", "a red circle", {"chair_s", "chair_i", "object_recall"}),
        ("describe", "a man on a horse", set()),
        ("caption", "a red circle", set()),
        ("presence (random)", "yes", {"pope"}),
        ("presence", "yes", set()),
        ("conversation", "yes", set()),
        ("color", "red", set()),
    ],
)
def test_they_apply_where_they_can_be_measured(kind, reference, measured):
    columns = {"predictions": ["red"], "references": [reference], "questions": ["what?"], "kinds": [kind]}
    found = score(**columns)
    assert {name for name in ("chair_s", "chair_i", "object_recall", "pope") if found[name] is not None} == measured


@pytest.mark.parametrize("kind", ["describe", "color"])
def test_chair_needs_a_description(kind):
    with pytest.raises(ValueError, match="No reference of kind `describe` names a thing"):
        chair(["a red circle"], ["nothing"], [kind])


def test_pope_by_hand():
    """Capitals and a period do not count; what is neither yes nor no is wrong, and no claim."""
    given = ["Yes.", "YES", "no", "a red circle", "yes no", ""]
    right = ["yes", "no", "yes", "yes", "no", "no"]
    found = Pope(keep_in_memory=True).compute(predictions=given, references=right, kinds=["presence (popular)"] * 6)
    expected = {"accuracy": 1 / 6, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "yes": 2 / 6}
    assert found == {"pope": {"presence (popular)": expected}}


def test_pope_of_absent_things_alone_has_no_recall():
    found = Pope(keep_in_memory=True).compute(
        predictions=["yes", "no"], references=["no", "no"], kinds=["presence (random)"] * 2
    )
    assert found["pope"]["presence (random)"] == {
        "accuracy": 0.5, "precision": 0.0, "recall": None, "f1": 0.0, "yes": 0.5
    }  # fmt: skip


def test_the_blind_baseline_is_measured_too():
    train, test = (load("mixture", split, 0, {"rows": 600}) for split in ("train", "test"))
    blind = evaluate_blind(train.remove_columns("images"), test)
    assert 0.2 < blind["exact_match"] < 0.5
    assert blind["object_recall"] < 0.3
    assert {0.3 < figures["accuracy"] < 0.7 for figures in blind["pope"].values()} == {True}
