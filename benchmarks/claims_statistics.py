"""Figures of answers, and how sure a difference between two models is: over seeds, and over the questions of one."""

import functools
import json
import math
import statistics
from pathlib import Path

import numpy as np

from llava_mod_hf.data.scenes import mentions, named_kinds
from llava_mod_hf.evaluation.measures import normalize_answer

# 97.5 % quantiles of Student's t with 1, 2, … degrees of freedom
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093,
)  # fmt: skip

RESAMPLES = 2000


def read_answers(folder):
    """`list[dict]`: `question`, `answer`, `kind` and `given` of each row."""
    columns = json.loads(Path(folder, "answers.json").read_text(encoding="utf-8"))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def counts(row):
    """
    What a row adds to each measure: `{measure: (numerator, denominator)}`; a measure is the ratio of the sums.

    `exact_match` of all rows; `chair_s` (descriptions with an absent thing), `chair_i`, `object_recall` and `object_f1`
    (of mentions, so that a thing named twice counts against it) of descriptions; `presence` (right answers) of
    questions of presence, and `adversarial` of the adversarial ones.
    """
    right = normalize_answer(row["given"]) == normalize_answer(row["answer"])
    found = {"exact_match": (right, 1)}
    if row["kind"] == "describe":
        named, there = set(named_kinds(row["given"])), set(named_kinds(row["answer"]))
        found["chair_s"] = (bool(named - there), 1)
        found["chair_i"] = (len(named - there), len(named))
        found["object_recall"] = (len(named & there), len(there))
        found["object_f1"] = (2 * len(named & there), len(mentions(row["given"])) + len(there))
        found["describe"] = (right, 1)
    elif row["kind"].startswith("presence"):
        found["presence"] = (right, 1)
        if "adversarial" in row["kind"]:
            found["adversarial"] = (right, 1)
    else:
        found[row["kind"]] = (right, 1)
    return found


def figures(rows):
    """`dict`: each measure of [`counts`] over rows."""
    sums: dict[str, list] = {}
    for row in rows:
        for name, (numerator, denominator) in counts(row).items():
            entry = sums.setdefault(name, [0, 0])
            entry[0] += numerator
            entry[1] += denominator
    return {name: numerator / denominator if denominator else 0.0 for name, (numerator, denominator) in sums.items()}


@functools.cache
def figures_of(folder):
    """[`figures`] of the answers in a folder, which is read once: a plan asks for them after every command."""
    return figures(read_answers(folder))


def interval(values):
    """Mean and 95 % interval of the mean over seeds, by Student's t: `(mean, low, high)`."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = T_QUANTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def bootstrap(first, second, measure, *, seed=0, resamples=RESAMPLES):
    """
    Difference of a measure between two models on the same questions, with a 95 % interval by a paired bootstrap.

    Args:
        first, second (`list[dict]`): rows of [`read_answers`], of the same questions.
        measure (`str`): of [`counts`].
        seed (`int`), resamples (`int`): of the bootstrap over questions.

    Returns:
        `tuple[float, float, float]`: first − second, low, high.

    Raises:
        ValueError: if the questions differ.
    """
    if [(r["question"], r["answer"]) for r in first] != [(r["question"], r["answer"]) for r in second]:
        raise ValueError("The two models were asked different questions: compare answers to the same rows.")
    counted = [(counts(a), counts(b)) for a, b in zip(first, second, strict=True)]
    pairs = np.array([(*a[measure], *b[measure]) for a, b in counted if measure in a], dtype=float)

    def difference(sums):
        return sums[0] / max(sums[1], 1) - sums[2] / max(sums[3], 1)

    rng = np.random.default_rng(seed)
    drawn = sorted(difference(pairs[rng.integers(len(pairs), size=len(pairs))].sum(0)) for _ in range(resamples))
    low, high = drawn[int(0.025 * resamples)], drawn[min(resamples - 1, int(0.975 * resamples))]
    return float(difference(pairs.sum(0))), float(low), float(high)
