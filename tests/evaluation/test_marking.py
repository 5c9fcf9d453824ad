"""Descriptions against what is there."""

import pytest

from llava_mod_hf.evaluation.marking import mark_description

ANSWER = "a red circle, a blue square and a green triangle"


def test_absent_things_are_told_apart_and_missing_ones_listed():
    found = mark_description("A Red circle, a blue circle and a green triangle.", ANSWER)
    assert found.pieces == (("A Red circle, a ", False), ("blue circle", True), (" and a green triangle.", False))
    assert found.missing == ("blue square",) and found.repeated == () and not found.right


@pytest.mark.parametrize(
    ("given", "right", "missing", "repeated"),
    [
        (ANSWER, True, (), ()),
        ("a green triangle, a red circle and a blue square", True, (), ()),
        ("", False, ("red circle", "blue square", "green triangle"), ()),
        ("a red circle, a blue square and a blue square", False, ("green triangle",), ("blue square",)),
        (f"{ANSWER} and a red circle", False, (), ("red circle",)),
        (f"{ANSWER} and a red square", False, (), ()),
    ],
)
def test_right_is_everything_once_and_nothing_else(given, right, missing, repeated):
    found = mark_description(given, ANSWER)
    assert (found.right, found.missing, found.repeated) == (right, missing, repeated)
    assert "".join(text for text, _ in found.pieces) == given


def test_an_absent_thing_named_twice_is_absent_twice():
    found = mark_description("a red square and a red square", "a red circle")
    assert [text for text, absent in found.pieces if absent] == ["red square", "red square"]
    assert found.repeated == ()
