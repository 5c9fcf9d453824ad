"""POPE's published rows and answers in sentences; the scenes' are in test_scene_measures.py."""

import pytest

from llava_mod_hf.evaluation.metrics.pope import PopeBenchmark


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes, there is a dog.", "yes"),
        ("No, there is none.", "no"),
        ("There is not a dog. Yes.", "no"),
        ("Yes. But no cat.", "yes"),
        ("no", "no"),
        ("NO", "yes"),  # so published
        ("Nothing", "yes"),
        ("", "yes"),
    ],
)
def test_answers_are_read_as_published(answer, read):
    assert PopeBenchmark(keep_in_memory=True).read(answer) == read


def test_by_hand():
    rows = [  # answer, right, kind
        ("yes", "yes", "random"),
        ("yes", "no", "random"),
        ("no", "no", "Popular"),
        ("no", "yes", "presence (adversarial)"),
        ("yes", "yes", ""),
        ("yes", "yes", "color"),  # no question of presence
    ]
    predictions, references, kinds = map(list, zip(*rows, strict=True))
    found = PopeBenchmark(keep_in_memory=True).compute(predictions=predictions, references=references, kinds=kinds)
    overall = {name: value for name, value in found.items() if "/" not in name}
    assert overall == {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes": 3 / 5}
    assert found["random/accuracy"] == 1 / 2 and found["random/precision"] == 1 / 2 and found["random/recall"] == 1
    assert found["popular/accuracy"] == 1 and found["popular/precision"] is None and found["popular/yes"] == 0
    assert found["adversarial/recall"] == 0
    assert not any(name.startswith("color") for name in found)


def test_a_reference_that_is_neither_is_refused():
    with pytest.raises(ValueError, match="a reference is 'two'"):
        PopeBenchmark(keep_in_memory=True).compute(predictions=["yes"], references=["two"], kinds=["random"])
