"""Choices out of answers, and the circular evaluation by hand."""

import pytest

from llava_mod_hf.evaluation.metrics.multiple_choice import MultipleChoice, read_choice

OPTIONS = ["cat", "dog", "a black dog"]


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(c).", "C"),
        ("B. dog", "B"),
        ("The answer is B.", "B"),
        ("A cat sits there", "A"),  # by its text, since "A" is an article here
        ("A dog sits there", "B"),
        ("It's a black dog.", "C"),  # not also "dog"
        ("A or B", None),
        ("B is right", "B"),
        ("A is right", "A"),
        ("cat and dog", None),
        ("D", None),
        ("d", None),
        ("I see a bird", None),
        ("doge", None),
        ("", None),
    ],
)
def test_what_an_answer_chooses(answer, choice):
    assert read_choice(answer, OPTIONS) == choice


def test_a_question_is_right_only_in_all_rotations():
    rows = [  # answer, right letter, options, question
        ("A", "A", ["x", "y"], "0"),
        ("B", "B", ["y", "x"], "0"),
        ("A", "A", ["x", "y"], "1"),
        ("A", "B", ["y", "x"], "1"),
        ("none", "B", ["x", "y"], "2"),
        ("A", "A", ["y", "x"], "2"),
    ]
    names = ("predictions", "references", "options", "groups")
    found = MultipleChoice(keep_in_memory=True).compute(
        **dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    )
    assert found == {"circular_accuracy": 1 / 3, "plain_accuracy": 2 / 3, "unread_choices": 1 / 6}
