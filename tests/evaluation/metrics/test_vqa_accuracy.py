"""VQA accuracy against hand-worked cases, and the published normaliser's results."""

import itertools

import pytest

from llava_mod_hf.evaluation.metrics.vqa_accuracy import VqaAccuracy, normalize_vqa


def accuracy(prediction, references):
    metric = VqaAccuracy(keep_in_memory=True)
    return metric.compute(predictions=[prediction], references=[references])["vqa_accuracy"]


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_the_known_table_of_ten_annotators(agreeing, expected):
    assert accuracy("red", ["red"] * agreeing + ["blue"] * (10 - agreeing)) == pytest.approx(expected)


def test_it_is_the_mean_over_all_nine_of_ten():
    references = ["red", "red", "blue", "red", "green", "blue", "red", "black", "white", "grey"]
    for said in ("red", "blue", "green", "pink"):
        nines = list(itertools.combinations(range(10), 9))
        plain = sum(min(sum(references[place] == said for place in nine) / 3, 1) for nine in nines) / len(nines)
        assert accuracy(said, references) == pytest.approx(plain)


# what the evaluation of GT-Vision-Lab/VQA makes of each, run once
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Zoo.", "zoo"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("red-white", "red white"),
        ("dog , cat", "dog cat"),
        ("cat,dog", "cat dog"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("youre", "you're"),
        ("shouldn'tve", "shouldn't've"),
        ("somebody'd", "somebodyd"),
        ("a\nb", "b"),
        ("it's", "it's"),
        ("(left)", "left"),
        ("50%", "50%"),
        ("cat/dog 1,5", "catdog 15"),
    ],
)
def test_answers_are_normalised_as_published(text, expected):
    assert normalize_vqa(text) == expected


def test_both_sides_are_normalised():
    assert accuracy("A Dog.", ["the dog"] * 10) == 1


def test_too_few_annotators_are_refused():
    assert accuracy("red", ["red"] * 4) == 1
    with pytest.raises(ValueError, match="has 3 annotators' answers"):
        accuracy("red", ["red"] * 3)
