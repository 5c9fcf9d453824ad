"""Whether a claim holds, by the conditions that `claims.yaml` names under `needs`, over paired differences of seeds."""

import statistics

from claims_statistics import interval, percent

NAMES = {
    "exact_match": "exact match",
    "presence": "presence",
    "adversarial": "adversarial presence",
    "chair_s": "hallucinated descriptions",
    "chair_i": "absent of named things",
    "object_recall": "things found",
    "object_f1": "F1 of things",
}

# What a condition asks of the differences: of their interval, or of a loss that is small or not shown.
CONDITIONS = {
    "above": lambda values, bound: interval(values)[1] > bound,
    "below": lambda values, bound: interval(values)[2] < bound,
    "apart_from": lambda values, bound: not interval(values)[1] <= bound <= interval(values)[2],
    "loses_at_most": lambda values, bound: interval(values)[2] >= 0 or statistics.fmean(values) >= -bound,
}


def by_arm(runs):
    """`{(point, arm): {seed: run}}`."""
    found: dict[tuple, dict] = {}
    for run in runs:
        found.setdefault((run["point"], run["arm"]), {})[run["seed"]] = run
    return found


def differences(first, second, measure):
    """A measure's differences, a seed each, of two arms."""
    seeds = sorted(first.keys() & second.keys())
    return [first[seed]["figures"][measure] - second[seed]["figures"][measure] for seed in seeds]


def to_teacher(seeds, measure):
    """A measure's differences, a seed each, of an arm to its teacher."""
    return [run["figures"][measure] - run["teacher"][measure] for run in seeds.values() if "teacher" in run]


def failures(claim, point, arm, runs, seeds):
    """
    Conditions of a claim that an arm misses.

    Returns:
        `list[str]`: each as a difference and its interval; `None` of an arm with fewer than `seeds`.
    """
    missed, own = [], runs.get((point, arm), {})
    for need in claim["needs"]:
        measure, to = need["measure"], need["to"]
        other = {} if to == "teacher" else runs.get((point, to), {})
        values = to_teacher(own, measure) if to == "teacher" else differences(own, other, measure)
        if len(values) < seeds:
            return None
        [(condition, bound)] = [(name, need[name]) for name in CONDITIONS if name in need]
        if not CONDITIONS[condition](values, bound):
            whose = "its teacher" if to == "teacher" else f"“{to}”"
            missed.append(f"{NAMES[measure]} to {whose} {percent(values, '+')}")
    return missed


def judged(claim, runs, seeds):
    """`{(point, arm): failures}` of everything that the claim is judged by: no rivals."""
    rivals = [claim["against"], *claim.get("rivals", [])]
    arms = claim.get("of") or [arm for arm in claim["arms"] if arm not in rivals]
    return {(at, arm): failures(claim, at, arm, runs, seeds) for at in claim.get("at") or claim["vary"] for arm in arms}


def _names(keys):
    return "; ".join(f"{arm} ({point})" if point else arm for point, arm in keys)


def verdict_lines(claim, runs, seeds):
    """Markdown: whether the claim holds, and by what each arm fails; what has fewer than `seeds` is not judged."""
    found = judged(claim, runs, seeds)
    missed = {key: each for key, each in found.items() if each}
    held, left = ([key for key in found if found[key] == state] for state in ([], None))
    if not held and not missed:
        word = "Not decided"
    elif claim.get("one_is_enough"):
        word = "It holds" if held else "It does not hold"
    elif missed:
        word = "It holds in part" if held else "It does not hold"
    else:
        word = "It holds"
    word += " so far" if left and (held or missed) and not (held and claim.get("one_is_enough")) else ""
    first = f"**{word}" + (f":** {_names(held)}." if held else ".**")
    first += f" Not run on {seeds} seeds: {_names(left)}." if left else ""
    lines = [first, ""]
    if missed:
        lines += [f"It fails{' elsewhere' if held else ''}, by what is told:", ""]
        lines += [f"- {_names([key])}: {'; '.join(each)}." for key, each in missed.items()] + [""]
    return lines
