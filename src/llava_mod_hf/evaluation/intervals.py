"""Figures of answers to the scenes, and how sure they and their differences are: 95 % intervals over the questions."""

import functools

import numpy as np

from llava_mod_hf.data.scenes import mentions, named_kinds
from llava_mod_hf.evaluation.measures import DESCRIBE, PRESENCE, normalize_answer

RESAMPLES = 2000


def counts(row):
    """
    What a row adds to each measure: `{measure: (numerator, denominator)}`; a measure is the ratio of the sums.

    `exact_match` of all rows; `chair_s` (descriptions with an absent thing), `chair_i`, `object_recall` and `object_f1`
    (of mentions, so that a thing named twice counts against it) of descriptions; `presence` (right answers) of
    questions of presence, and by their sort `random`, `popular`, `adversarial`; right answers of every other kind by
    its name.

    Args:
        row (`dict`): `answer`, `kind` and `given`.
    """
    right = normalize_answer(row["given"]) == normalize_answer(row["answer"])
    found = {"exact_match": (right, 1)}
    if row["kind"] == DESCRIBE:
        named, there = set(named_kinds(row["given"])), set(named_kinds(row["answer"]))
        found["chair_s"] = (bool(named - there), 1)
        found["chair_i"] = (len(named - there), len(named))
        found["object_recall"] = (len(named & there), len(there))
        found["object_f1"] = (2 * len(named & there), len(mentions(row["given"])) + len(there))
    elif row["kind"].startswith(PRESENCE):
        found["presence"] = (right, 1)
    found[row["kind"].removeprefix(PRESENCE).removesuffix(")")] = (right, 1)
    return found


def _columns(rows):
    """`{measure: array (rows, 2)}` of numerators and denominators."""
    columns: dict[str, np.ndarray] = {}
    for number, row in enumerate(rows):
        for name, pair in counts(row).items():
            columns.setdefault(name, np.zeros((len(rows), 2)))[number] = pair
    return columns


def _ratio(sums):
    """Numerator by denominator (…, 2), 0 where there is nothing to count."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] > 0)


def figures(rows):
    """`dict`: each measure of [`counts`] over rows."""
    return {name: float(_ratio(column.sum(0))) for name, column in _columns(rows).items()}


@functools.lru_cache(maxsize=1)
def _draws(count, seed, resamples):
    """How often each of `count` questions is drawn in each resample, (resamples, count)."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)


def intervals(rows, against=None, *, seed=0, resamples=RESAMPLES):
    """
    Every measure with its 95 % interval over the questions, by a bootstrap; or the differences to another model.

    Differences are paired: each resample asks both models the same questions.

    Args:
        rows (`list[dict]`): `question`, `answer`, `kind` and `given` of each.
        against (`list[dict]`, *optional*): another model's answers to the same questions, which are taken off.
        seed (`int`, *optional*, defaults to 0), resamples (`int`, *optional*, defaults to 2000): of the bootstrap.

    Returns:
        `dict[str, tuple[float, float, float]]`: value, low and high of each measure of [`counts`].

    Raises:
        ValueError: if there is no row, or the questions differ.
    """
    if not rows:
        raise ValueError("There are no answers to measure: give at least one row.")
    others = None if against is None else _columns(against)
    if against is not None and [(r["question"], r["answer"], r["kind"]) for r in rows] != [
        (r["question"], r["answer"], r["kind"]) for r in against
    ]:
        raise ValueError("The two models were asked different questions: compare answers to the same rows.")
    draws, found = _draws(len(rows), seed, resamples), {}
    for name, column in _columns(rows).items():
        value, drawn = _ratio(column.sum(0)), _ratio(draws @ column)
        if others is not None:
            value, drawn = value - _ratio(others[name].sum(0)), drawn - _ratio(draws @ others[name])
        found[name] = (float(value), *(float(end) for end in np.quantile(drawn, (0.025, 0.975))))
    return found
