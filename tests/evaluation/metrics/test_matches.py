"""Exact match, ChartQA's relaxed match and ANLS by hand."""

import pytest

from llava_mod_hf.evaluation.metrics.anls import Anls, edits
from llava_mod_hf.evaluation.metrics.exact_match import ExactMatch
from llava_mod_hf.evaluation.metrics.relaxed_match import RelaxedMatch


def one(metric, prediction, *references):
    (figure,) = metric(keep_in_memory=True).compute(predictions=[prediction], references=[references]).values()
    return figure


def test_any_reference_counts_and_the_mean_is_over_rows():
    found = ExactMatch(keep_in_memory=True).compute(
        predictions=["Red.", "blue", "a dog"], references=[["green", "red"], ["red"], ["dog"]]
    )
    assert found == {"exact_match": 1 / 3}


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("-95", "-100", True),
        ("95", "-100", False),
        ("0.5", "50%", True),
        ("50", "50%", False),
        ("52%", "50%", True),
        ("14.", "14", True),
        ("0", "0", True),
        ("0.01", "0", False),
        ("0.0", "0", False),  # of a reference of 0 the texts have to be equal
        ("Yes", "yes", True),
        ("yes.", "yes", False),
        ("2,000", "2000", False),
        ("nan", "1", False),
        ("inf", "inf", True),  # no number: a word
        (" Brazil ", "brazil", True),
        ("brasil", "brazil", False),
    ],
)
def test_relaxed_match(prediction, reference, right):
    assert one(RelaxedMatch, prediction, reference) == right
    assert one(RelaxedMatch, prediction, "other", reference) == right


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edits(first, second, expected):
    assert edits(first, second) == edits(second, first) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Sitting", ["kitten"], 1 - 3 / 7),
        ("kitten", ["kitten", "other"], 1),
        ("KITTEN  one", ["kitten one"], 1),
        ("ab", ["ax"], 0.5),  # one half is kept
        ("abc", ["axy"], 0),  # a third is not
        ("", ["word"], 0),
        ("", [""], 1),
    ],
)
def test_anls(prediction, references, expected):
    assert one(Anls, prediction, *references) == pytest.approx(expected)
