"""Each figure of `results.json` has its label, its direction and its interval; what is none is refused."""

import pytest

from llava_mod_hf.evaluation.benchmarks import BENCHMARKS
from llava_mod_hf.publishing.scores import TITLES, Score, scores

ONE = {"value": 0.5, "low": 0.4, "high": 0.6}


def test_every_figure_of_an_evaluation_has_a_label_and_a_direction():
    results = {
        "exact_match": 0.9,
        "exact_match_by_kind": {"yes/no": 0.8},
        "hallucination_rate": 0.1,
        "miss_rate": 0.2,
        "balanced_accuracy": 0.85,
        "chair_s": 0.3,
        "chair_i": 0.25,
        "object_recall": 0.7,
        "pope": {"presence (random)": {"accuracy": 0.9, "precision": 0.8, "recall": 0.7, "f1": 0.75, "yes": 0.5}},
        "kl_to_teacher": 0.05,
        "params_total": 5,
    }
    assert list(scores(results).values()) == [
        Score("Exact match", "↑", 0.9),
        Score("Exact match, yes/no", "↑", 0.8),
        Score("Hallucination rate", "↓", 0.1),
        Score("Miss rate", "↓", 0.2),
        Score("Balanced accuracy", "↑", 0.85),
        Score("Descriptions that name an absent thing", "↓", 0.3),
        Score("Named things that are absent", "↓", 0.25),
        Score("Present things that are named", "↑", 0.7),
        Score("KL divergence to the teacher, nats", "↓", 0.05),
        Score("POPE, presence (random): accuracy", "↑", 0.9),
        Score("POPE, presence (random): F1", "↑", 0.75),
        Score("POPE, presence (random): share of yes", "", 0.5),
    ]
    assert "pope_presence_random_f1" in scores(results)


def test_measures_have_their_intervals():
    unknown = {"value": None, "low": None, "high": None}
    measures = {
        "exact_match": {"exact_match": ONE},
        "anls": {"anls": ONE},
        "pope": {"recall": ONE, "popular/yes": ONE, "popular/f1": unknown, "popular/recall": ONE},
        "multiple_choice": {"circular_accuracy": ONE, "unread_choices": ONE},
        "mine": {"word_recall": ONE},
    }
    found = scores({"exact_match": 0.4, "measures": measures})
    assert found == {
        "exact_match": Score("Exact match", "↑", 0.4),
        "exact_match_any": Score("Exact match with any answer", "↑", 0.5, 0.4, 0.6),
        "anls": Score("ANLS", "↑", 0.5, 0.4, 0.6),
        "pope_recall": Score("POPE: recall", "↑", 0.5, 0.4, 0.6),
        "pope_popular_yes": Score("POPE, popular: share of yes", "", 0.5, 0.4, 0.6),
        "multiple_choice_circular_accuracy": Score("Multiple choice: circular accuracy", "↑", 0.5, 0.4, 0.6),
        "multiple_choice_unread_choices": Score("Multiple choice: unread choices", "↓", 0.5, 0.4, 0.6),
        "mine_word_recall": Score("mine: word recall", "↑", 0.5, 0.4, 0.6),
    }
    assert found["anls"].cell() == "0.500 (0.400–0.600)"


def test_a_figure_that_is_measured_twice_is_told_once_with_its_interval():
    results = {
        "exact_match": 0.5,
        "chair_s": 0.3,
        "chair_i": 0.3,
        "object_recall": 0.3,
        "pope": {"presence (random)": {"accuracy": 0.9, "f1": 0.9, "yes": 0.9}},
    }
    measures = {"exact_match": {"exact_match": ONE}, "chair": {"chair_s": ONE}, "pope": {"random/f1": ONE}}
    assert scores({**results, "measures": measures}) == {
        "exact_match": Score("Exact match", "↑", 0.5, 0.4, 0.6),
        "chair_chair_s": Score("CHAIR: descriptions that name an absent thing", "↓", 0.5, 0.4, 0.6),
        "pope_random_f1": Score("POPE, random: F1", "↑", 0.5, 0.4, 0.6),
    }


@pytest.mark.parametrize("part", ["value", "low", "high"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "many"])
def test_what_is_no_number_is_refused(part, value):
    with pytest.raises(ValueError, match=f"`anls` is {value}, not a finite number"):
        scores({"exact_match": 0.5, "measures": {"anls": {"anls": {**ONE, part: value}}}})


def test_every_measure_has_a_title_and_what_is_unread_is_bad():
    assert TITLES.keys() >= {
        name for name, each in BENCHMARKS.items() if each.metric.__module__.startswith("llava_mod_hf")
    }
    judged = {"score": {"value": 2.5}, "hallucination_rate": {"value": 0.4}, "unread_verdicts": {"value": 0.1}}
    found = scores({"exact_match": 0.5, "measures": {"mmhal": judged}})
    assert [(score.label, score.arrow) for score in found.values()][1:] == [
        ("MMHal: score, 0 to 6", "↑"),
        ("MMHal: hallucination rate", "↓"),
        ("MMHal: unread verdicts", "↓"),
    ]
