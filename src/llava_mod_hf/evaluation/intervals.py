"""How sure figures and their differences are: 95 % intervals over the questions, and a paired test."""

import numpy as np

from llava_mod_hf.data.scenes import mentions, named_kinds
from llava_mod_hf.evaluation.metrics.chair import DESCRIBE, count_things
from llava_mod_hf.evaluation.metrics.pope import PRESENCE
from llava_mod_hf.evaluation.metrics.ratios import normalize_answer

RESAMPLES = 2000

AT_ONCE = 20_000_000  # numbers drawn at a time, so that memory does not grow with the questions


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
        there = set(named_kinds(row["answer"]))
        found |= count_things(named_kinds(row["given"]), there)
        hits = found["object_recall"][0]
        found["object_f1"] = (2 * hits, len(mentions(row["given"])) + len(there))
    elif row["kind"].startswith(PRESENCE):
        found["presence"] = (right, 1)
    found[row["kind"].removeprefix(PRESENCE).removesuffix(")")] = (right, 1)
    return found


def _columns(units):
    """`{figure: array (units, 2)}` of numerators and denominators."""
    columns: dict[str, np.ndarray] = {}
    for number, unit in enumerate(units):
        for name, pair in unit.items():
            columns.setdefault(name, np.zeros((len(units), 2)))[number] = pair
    return columns


def _ratio(sums, empty=0.0):
    """Numerator by denominator (…, 2), `empty` where there is nothing to count."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], empty), where=sums[..., 1] > 0)


def figures(rows):
    """`dict`: each measure of [`counts`] over rows."""
    return {name: float(_ratio(column.sum(0))) for name, column in _columns(list(map(counts, rows))).items()}


def _parts(count, resamples):
    """How many resamples to draw at a time, of so many units."""
    size = max(1, AT_ONCE // count)
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def _resampled(table, seed, resamples):
    """The sums of a table (units, columns) over resampled units, (resamples, columns)."""
    rng, shares = np.random.default_rng(seed), np.full(len(table), 1 / len(table))
    draws = (rng.multinomial(len(table), shares, size=part) for part in _parts(len(table), resamples))
    return np.concatenate([part.astype(float) @ table for part in draws])


def intervals_of(units, against=None, *, seed=0, resamples=RESAMPLES, empty=None):
    """
    Every figure with its 95 % interval over the units, by a bootstrap; or the differences to another model.

    Differences are paired: each resample draws the same units of both models.

    Args:
        units (`list[dict[str, tuple[float, float]]]`): of each question, or of questions that belong together, what it
            adds to each figure: numerator and denominator.
        against (*optional*): the same of another model, which is taken off.
        seed (`int`, *optional*, defaults to 0), resamples (`int`, *optional*, defaults to 2000): of the bootstrap.
        empty (`float`, *optional*): value of a figure where nothing counts; without it such resamples are left out, and
            a figure of which nothing counts is `None`.

    Returns:
        `dict[str, tuple[float, float, float]]`: value, low and high of each figure.
    """
    fill = np.nan if empty is None else empty
    models = [_columns(units), *([] if against is None else [_columns(against)])]
    names = list(models[0])
    table = np.concatenate([model[name] for model in models for name in names], axis=1)
    sums = np.concatenate([table.sum(0)[None], _resampled(table, seed, resamples)])  # the whole, then the resamples
    values = _ratio(sums.reshape(len(sums), len(models), len(names), 2), fill)
    values = values[:, 0] - values[:, 1] if against is not None else values[:, 0]  # (1 + resamples, figures)
    found = {name: (values[0, place], values[1:, place]) for place, name in enumerate(names)}
    return {
        name: (None,) * 3
        if np.isnan(value)
        else (float(value), *(float(end) for end in np.nanquantile(each, (0.025, 0.975))))
        for name, (value, each) in found.items()
    }


def paired_test(units, against, *, seed=0, resamples=RESAMPLES):
    """
    How often a difference as large as that of two models would come by chance: a test by random swaps.

    Were the two alike, which of them gave which of the two answers to a question would not matter: each resample swaps
    the models' answers to about half of the units.

        p = (1 + swaps with |difference| ≥ |that of the models|) / (1 + resamples)

    Args:
        units, against, seed, resamples: as in [`intervals_of`].

    Returns:
        `dict[str, float or None]`: p of each figure; `None` where nothing counts.
    """
    own, others = _columns(units), _columns(against)
    first, second = (np.concatenate([model[name] for name in own], axis=1) for model in (own, others))
    rng, swapped = np.random.default_rng(seed), [np.zeros((1, first.shape[1]))]  # first, nothing is swapped
    for part in _parts(len(first), resamples):
        swapped.append(rng.integers(2, size=(part, len(first))).astype(float) @ (second - first))
    gained = np.concatenate(swapped)  # (1 + resamples, 2 · figures)
    sides = (first.sum(0) + gained, second.sum(0) - gained)
    values = [_ratio(side.reshape(len(side), -1, 2), np.nan) for side in sides]
    apart = np.abs(values[0] - values[1])  # (1 + resamples, figures)
    as_large = (apart[1:] >= apart[0] - 1e-9).sum(0)  # less what the order of a sum makes
    return {
        name: None if np.isnan(apart[0, place]) else float((1 + as_large[place]) / (1 + resamples))
        for place, name in enumerate(own)
    }


def intervals(rows, against=None, *, seed=0, resamples=RESAMPLES):
    """
    [`intervals_of`] the measures of the scenes.

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
    if against is not None and [(r["question"], r["answer"], r["kind"]) for r in rows] != [
        (r["question"], r["answer"], r["kind"]) for r in against
    ]:
        raise ValueError("The two models were asked different questions: compare answers to the same rows.")
    others = None if against is None else list(map(counts, against))
    return intervals_of(list(map(counts, rows)), others, seed=seed, resamples=resamples, empty=0.0)
