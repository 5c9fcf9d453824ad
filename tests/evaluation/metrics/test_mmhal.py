"""MMHal's figures, of ratings as a judge writes them: what is no rating is counted, never guessed."""

import pytest

from llava_mod_hf.evaluation.metrics.mmhal import PROMPT, Mmhal, read_rating


@pytest.mark.parametrize(
    ("verdict", "rating"),
    [
        ("It is right.\nRating: 4", 4),
        ("**Rating: 0**, hallucination", 0),
        ("- Rating: **6**, very informative", 6),
        ("rating:3. I repeat, Rating: 3", 3),
        ("Rating: 5/6", 5),
        ("Rating: 2 or Rating: 3", None),
        ("Rating: 7", None),
        ("Rating: 10", None),
        ("Rating: 3.5", None),
        ("Rating: high", None),
        ("4", None),
        ("the overrating: 4", None),
        ("", None),
    ],
)
def test_a_rating_is_read_or_is_none(verdict, rating):
    assert read_rating(verdict) == rating


def test_unread_verdicts_change_no_other_figure():
    verdicts = ["Rating: 6", "Rating: 2", "I cannot say.", "Rating: 3", "?"]
    kinds = ["attribute", "attribute", "attribute", "other", ""]
    metric = Mmhal(keep_in_memory=True)
    assert metric.compute(predictions=["x"] * 5, kinds=kinds, verdicts=verdicts) == {
        "score": 11 / 3,
        "hallucination_rate": 1 / 3,
        "unread_verdicts": 2 / 5,
        "attribute/score": 4,
        "other/score": 3,
    }
    nothing = metric.compute(predictions=["x"], kinds=[""], verdicts=["?"])
    assert nothing == {"score": None, "hallucination_rate": None, "unread_verdicts": 1}


def test_the_prompt_has_its_four_places_and_asks_for_what_is_read():
    text = PROMPT.format("a cat", "what?", "a cat.", "a {dog}")
    assert all(part in text for part in ("a cat", "what?", "a cat.", "a {dog}")) and PROMPT.count("{}") == 4
    assert read_rating(text) == 4  # its example
