"""What is measured of answers wherever its rows are found: metrics of `evaluate` that need no network."""

from collections.abc import Callable
from typing import NamedTuple

import datasets
import evaluate

from llava_mod_hf.data.easy_vqa import presence
from llava_mod_hf.data.scenes import named_kinds
from llava_mod_hf.evaluation.metrics.chair import DESCRIBE, CaptionHallucination
from llava_mod_hf.evaluation.metrics.pope import PRESENCE, Pope
from llava_mod_hf.evaluation.metrics.ratios import normalize_answer


def _share(hits):
    hits = list(hits)
    return sum(hits) / len(hits)


def _metric_info(description, inputs):
    features = datasets.Features({name: datasets.Value("string") for name in inputs})
    return evaluate.MetricInfo(
        description=description,
        citation="",
        features=features,
        inputs_description="Lists of strings, one per question.",
    )


class VqaExactMatch(evaluate.Metric):
    """
    Share of answers that equal the reference, overall and for each kind of question.

    Spaces around an answer, capitals and one trailing period do not count, on either side.

    `compute(predictions=…, references=…, kinds=…)` takes lists of strings and returns `exact_match` and
    `exact_match_by_kind`, with the kinds in alphabetical order. With `keep_in_memory=True` nothing is cached on disk.
    """

    def _info(self):
        return _metric_info("Exact match of normalised answers.", ["predictions", "references", "kinds"])

    def _compute(self, predictions, references, kinds):
        by_kind = {kind: [] for kind in sorted(set(kinds))}
        for prediction, reference, kind in zip(predictions, references, kinds, strict=True):
            by_kind[kind].append(normalize_answer(prediction) == normalize_answer(reference))
        return {
            "exact_match": _share(hit for hits in by_kind.values() for hit in hits),
            "exact_match_by_kind": {kind: _share(hits) for kind, hits in by_kind.items()},
        }


class ObjectHallucination(evaluate.Metric):
    """
    How often a model claims that a thing is there which is not, and the reverse, on yes/no questions of presence.

    "no" to "is there not a circle?" is a claim that there is one. Rows whose reference is neither yes nor no are left
    out; a prediction that is neither is no claim and no denial, hence wrong whatever the image shows.

        hallucination_rate = claims | absent             miss_rate = 1 − claims | present
        balanced_accuracy  = (claims | present + denials | absent) / 2

    `compute(predictions=…, questions=…, references=…)` takes lists of strings. With `keep_in_memory=True` nothing is
    cached on disk.

    Raises:
        ValueError: if there is no question about a present thing, or none about an absent one.
    """

    def _info(self):
        return _metric_info(
            "Claims of absent things and misses of present ones.", ["predictions", "questions", "references"]
        )

    def _compute(self, predictions, questions, references):
        claims = {True: [], False: []}  # by whether the thing is there
        for prediction, question, reference in zip(predictions, questions, references, strict=True):
            present = _presence(question, reference)
            if present is not None:
                claims[present].append(_presence(question, prediction))
        if not (claims[True] and claims[False]):
            raise ValueError(
                f"Of {len(references)} rows {len(claims[True])} ask with yes or no for a present thing and "
                f"{len(claims[False])} for an absent one: at least one of each is needed, with `yes` or `no` as its "
                "reference."
            )
        claimed = _share(claim is True for claim in claims[True])
        return {
            "hallucination_rate": _share(claim is True for claim in claims[False]),
            "miss_rate": 1 - claimed,
            "balanced_accuracy": (claimed + _share(claim is False for claim in claims[False])) / 2,
        }


def _presence(question, answer):
    return presence(question.lower(), normalize_answer(answer))


def asks_for_presence(questions, references, **columns):
    """Whether some questions are about a thing that is there, and some about one that is not."""
    return {_presence(*pair) for pair in zip(questions, references, strict=True)} >= {True, False}


def _describes(references, kinds, **columns):
    pairs = zip(references, kinds, strict=True)
    return any(kind == DESCRIBE and named_kinds(reference) for reference, kind in pairs)


def _has_pope_rows(kinds, **columns):
    return any(kind.startswith(PRESENCE) for kind in kinds)


class Measure(NamedTuple):
    """
    A measure of answers.

    Args:
        metric (`type[evaluate.Metric]`): whose `compute` takes lists of strings and returns a `dict`.
        inputs (`tuple[str, ...]`): what it takes, of `predictions`, `references`, `questions` and `kinds`.
        gives (`tuple[str, ...]`): the keys that it returns; each is `None` where it cannot be measured.
        applies (`Callable[..., bool]`): whether it can, by all four lists as keywords.
        lower_is_better (`tuple[str, ...]`): of the keys, those whose figures are better when lower.
    """

    metric: type
    inputs: tuple
    gives: tuple
    applies: Callable = lambda **columns: True
    lower_is_better: tuple = ()


MEASURES = {
    "exact match": Measure(
        VqaExactMatch, ("predictions", "references", "kinds"), ("exact_match", "exact_match_by_kind")
    ),
    "hallucination": Measure(
        ObjectHallucination,
        ("predictions", "questions", "references"),
        ("hallucination_rate", "miss_rate", "balanced_accuracy"),
        asks_for_presence,
        ("hallucination_rate", "miss_rate"),
    ),
    "caption hallucination": Measure(
        CaptionHallucination,
        ("predictions", "references", "kinds"),
        ("chair_s", "chair_i", "object_recall"),
        _describes,
        ("chair_s", "chair_i"),
    ),
    "pope": Measure(Pope, ("predictions", "references", "kinds"), ("pope",), _has_pope_rows),
}


def register_measure(name, measure):
    """
    Adds a measure: `evaluate` then writes its figures for student, teacher and blind baseline.

    Args:
        name (`str`): of the measure.
        measure ([`Measure`]).

    Raises:
        ValueError: if there is one of that name, or one that gives the same figure.
    """
    given = {figure for entry in MEASURES.values() for figure in entry.gives}
    if name in MEASURES or given & set(measure.gives):
        raise ValueError(f"There is a measure `{name}`, or one of {', '.join(measure.gives)}, already: name it anew.")
    MEASURES[name] = measure


def score(**columns):
    """
    All of [`MEASURES`] of some answers.

    Args:
        columns (`list[str]`): `predictions`, `references`, `questions` and `kinds`.

    Returns:
        `dict`: the figures of every measure.
    """
    scores = {}
    for measure in MEASURES.values():
        scores |= dict.fromkeys(measure.gives)
        if measure.applies(**columns):
            metric = measure.metric(keep_in_memory=True)
            scores |= metric.compute(**{name: columns[name] for name in measure.inputs})
    return scores
