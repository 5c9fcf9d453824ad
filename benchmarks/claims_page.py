"""The page of the claims: a table for each, from the JSON files alone."""

import json
import statistics

from claims_statistics import interval

NAMES = {
    "exact_match": "exact match",
    "presence": "presence",
    "adversarial": "adversarial presence",
    "chair_s": "hallucinated descriptions",
    "chair_i": "absent of named things",
    "object_recall": "things found",
    "object_f1": "F1 of things",
}


def _percent(values, sign=""):
    mean, low, _ = interval(values)
    width = f" ± {100 * (mean - low):.1f}" if len(values) > 1 else ""
    return f"{100 * mean:{sign}.1f}{width}"


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


def _side(values):
    _, low, high = interval(values)
    return "above" if low > 0 else "below" if high < 0 else "no difference shown"


def verdict(claim, point, runs):
    """One sentence: on which side of what they are compared with the arms lie, by the first measure."""
    measure, against = claim["measures"][0], runs.get((point, claim["against"]), {})
    sides: dict[str, list] = {"above": [], "below": [], "no difference shown": []}
    for arm in claim["arms"]:
        found = differences(runs.get((point, arm), {}), against, measure)
        if arm != claim["against"] and len(found) > 1:
            sides[_side(found)].append(f"{arm} ({_percent(found, '+')})")
    said = [f"{side}: {', '.join(arms)}" for side, arms in sides.items() if arms]
    return f"{NAMES[measure].capitalize()} against “{claim['against']}”, {'; '.join(said)}." if said else ""


def told_first(claim, point, runs):
    """Sentences on pairs of arms that the claim names: the first measure, and recall beside it."""
    lines = []
    for arm, rival in claim.get("told_first", []):
        first, second = runs.get((point, arm), {}), runs.get((point, rival), {})
        cells = [(NAMES[each], differences(first, second, each)) for each in (claim["measures"][0], "object_recall")]
        if len(cells[0][1]) > 1:
            said = ", ".join(f"{name} {_percent(values, '+')}" for name, values in cells)
            lines.append(f"“{arm}” less “{rival}”: {said}.")
    return lines


def claim_lines(name, claim, found):
    """Markdown of one claim."""
    measures, runs = claim["measures"], by_arm(found["runs"])
    lines = [f"## {claim['section']}. {claim['says']}", "", f"Counts as holding: {claim['holds'].strip()}", ""]
    lines += [f"{claim['test_rows']} test rows.", ""] if "test_rows" in claim else []
    points = list(dict.fromkeys(point for point, _ in runs))
    for point in [point for point in claim["vary"] if point in points]:
        lines += [f"### {point}", ""] if point else []
        lines += [
            line
            for said in (*told_first(claim, point, runs), verdict(claim, point, runs))
            if said
            for line in (said, "")
        ]
        lines += [
            "| | seeds | " + " | ".join(NAMES[each] for each in measures) + " |",
            "|---" * (len(measures) + 2) + "|",
        ]
        for arm in claim["arms"]:
            seeds = runs.get((point, arm))
            if not seeds:
                lines.append(f"| {arm} | 0 |" + " not run |" * len(measures))
                continue
            cells = [_percent([run["figures"][each] for run in seeds.values()]) for each in measures]
            lines.append(f"| {arm} | {len(seeds)} | {' | '.join(cells)} |")
            teachers = [run["teacher"] for run in seeds.values() if "teacher" in run]
            if teachers:
                cells = [f"*{100 * statistics.fmean(each[m] for each in teachers):.1f}*" for m in measures]
                lines.append(f"| *its teacher* | | {' | '.join(cells)} |")
        against = runs.get((point, claim["against"]))
        if against:
            lines += ["", f"Paired differences to “{claim['against']}”, in points:", ""]
            lines += ["| | seeds | " + " | ".join(NAMES[each] for each in measures) + " |"]
            lines += ["|---" * (len(measures) + 2) + "|"]
            for arm in claim["arms"]:
                seeds = runs.get((point, arm))
                if arm == claim["against"] or not seeds or not seeds.keys() & against.keys():
                    continue
                cells = [_percent(differences(seeds, against, each), "+") for each in measures]
                lines.append(f"| {arm} | {len(seeds.keys() & against.keys())} | {' | '.join(cells)} |")
                if claim["measures"][0] == "chair_s" and to_teacher(seeds, "chair_s"):
                    cells = [f"*{_percent(to_teacher(seeds, each), '+')}*" for each in measures]
                    lines.append(f"| *to its teacher* | {len(to_teacher(seeds, 'chair_s'))} | {' | '.join(cells)} |")
        lines.append("")
    picked = [f"{each['arm']}: {each['learning_rate']:g}" for each in found["picked"]]
    lines += ["Learning rates picked on validation rows: " + "; ".join(picked) + ".", ""] if picked else []
    lines += ["```bash", f"python benchmarks/claims.py --only {name}", "```", ""]
    return lines


def page_lines(plan, names, results):
    """Markdown of all claims that have results."""
    centre = ", ".join(f"{key} {value}" for key, value in plan["centre"].items() if value not in ([], None))
    lines = [
        "<!-- written by `python benchmarks/claims.py --page docs/claims.md` -->",
        "# The claims, tested in a world of scenes",
        "",
        "Each claim, its arms, budget, measure and what counts as holding were written into `benchmarks/claims.yaml` "
        "before it was run. Per cent, mean over seeds ± half width of the 95 % interval of the mean (Student's t); "
        f"{plan['test_rows']} test rows for each seed, or as many as the claim says, whose arrangements occur in no "
        "training row. Each figure of each seed is in `benchmarks/results/claims/`.",
        "",
        f"Every arm differs from this centre by what its name says: {centre}.",
        "",
        plan["looked_at_before"].strip(),
        "",
    ]
    for name in names:
        path = results / f"{name}.json"
        if path.is_file():
            lines += claim_lines(name, plan["claims"][name], json.loads(path.read_text()))
    return lines


def write_page(plan, names, results, path):
    path.write_text("\n".join(page_lines(plan, names, results)).rstrip() + "\n", encoding="utf-8")
