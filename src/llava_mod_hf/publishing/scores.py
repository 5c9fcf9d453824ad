"""What was measured of a student, out of `results.json`: each figure with its label, its direction and its interval."""

import math
import re
from typing import NamedTuple

# figure of every evaluation → label
LABELS = {
    "exact_match": "Exact match",
    "hallucination_rate": "Hallucination rate",
    "miss_rate": "Miss rate",
    "balanced_accuracy": "Balanced accuracy",
    "chair_s": "Descriptions that name an absent thing",
    "chair_i": "Named things that are absent",
    "object_recall": "Present things that are named",
    "kl_to_teacher": "KL divergence to the teacher, nats",
}

# measure of `evaluate --measures` → title; another is called by its name
TITLES = {
    "exact_match": "Exact match with any answer",
    "vqa_accuracy": "VQA accuracy",
    "relaxed_match": "Relaxed match",
    "anls": "ANLS",
    "multiple_choice": "Multiple choice",
    "pope": "POPE",
    "chair": "CHAIR",
    "object_halbench": "Object HalBench",
    "mmhal": "MMHal",
}

# figure → where it is better; of all others up
DIRECTIONS = {
    **dict.fromkeys(
        (
            "hallucination_rate",
            "miss_rate",
            "kl_to_teacher",
            "chair_s",
            "chair_i",
            "response_hallucination",
            "mention_hallucination",
            "unread_choices",
            "unread_verdicts",
        ),
        "↓",
    ),
    "yes": "",
}

FIGURES = {
    "yes": "share of yes",
    "f1": "F1",
    "score": "score, 0 to 6",  # of a judge
    "chair_s": LABELS["chair_s"].lower(),
    "chair_i": LABELS["chair_i"].lower(),
    "object_recall": LABELS["object_recall"].lower(),
}

POPE = ("accuracy", "f1", "yes")  # those of its figures that are told of each sort of question

# measure → figures of every evaluation that it gives again, with intervals
AGAIN = {"pope": ("pope",), "chair": ("chair_s", "chair_i", "object_recall")}


class Score(NamedTuple):
    """
    A figure.

    Args:
        label, arrow (`str`): what it is, and `↑` or `↓`, where it is better, or nothing.
        value (`float`).
        low, high (`float`, *optional*): the ends of its 95 % interval, where that was measured.
    """

    label: str
    arrow: str
    value: float
    low: float | None = None
    high: float | None = None

    def cell(self):
        """`str`: as a table has it."""
        interval = "" if self.low is None or self.high is None else f" ({self.low:.3f}–{self.high:.3f})"
        return f"{self.value:.3f}{interval}"


def scores(results):
    """
    The figures of a model, or of answers.

    Args:
        results (`dict`): of `llava-mod evaluate`: `exact_match` and, where measured, the others; fractions.

    Returns:
        `dict[str, Score]`: by the metric's id, without what was not measured.

    Raises:
        ValueError: if there is no `exact_match`, or a figure is no finite number.
    """
    if not isinstance(results, dict) or results.get("exact_match") is None:
        raise ValueError(f"The results are {results}, without `exact_match`: evaluate the model first.")
    kinds = results.get("exact_match_by_kind") or {}
    if not isinstance(kinds, dict):
        raise ValueError(f"`exact_match_by_kind` is {kinds}, not the scores of kinds by their names.")
    measures = results.get("measures") or {}
    again = {figure for measure in measures for figure in AGAIN.get(measure, ())}
    found = {}
    for metric, label in LABELS.items():
        if metric not in again:
            found[metric] = _score(metric, label, {"value": results.get(metric)}, metric)
        if metric == "exact_match":
            for kind, value in kinds.items():
                name = "exact_match_" + _id(kind)
                found[name] = _score(name, f"Exact match, {kind}", {"value": value}, metric)
    for kind, figures in ({} if "pope" in again else results.get("pope") or {}).items():
        for figure in POPE:
            name = f"pope_{_id(kind)}_{figure}"
            found[name] = _score(name, f"POPE, {kind}: {_words(figure)}", {"value": figures.get(figure)}, figure)
    _add_measures(found, measures)
    return {metric: score for metric, score in found.items() if score is not None}


def _add_measures(found, measures):
    """The figures of the benchmarks' measures, with their intervals; exact match may be the one that is there."""
    for measure, figures in measures.items():
        title = TITLES.get(measure, measure)
        for figure, given in figures.items():
            sort, _, last = figure.rpartition("/")
            if sort and last not in POPE:
                continue
            label = title if figure == measure else f"{title}{', ' if sort else ''}{sort}: {_words(last)}"
            name = _id(figure if figure == measure else f"{measure} {figure}")
            if name in found:
                label, same = found[name].label, found[name].value == given.get("value")
                name = name if same else f"{name}_any"
                label = label if same else title
            found[name] = _score(name, label, given, last)


def _id(text):
    return re.sub(r"\W+", "_", text).strip("_")


def _words(figure):
    return FIGURES.get(figure, figure.replace("_", " "))


def _score(metric, label, given, figure):
    numbers = {name: given.get(name) for name in ("value", "low", "high")}
    for value in numbers.values():
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"`{metric}` is {value}, not a finite number: leave out what was not measured.")
    if numbers["value"] is None:
        return None
    return Score(label, DIRECTIONS.get(figure, "↑"), *(None if n is None else float(n) for n in numbers.values()))
