"""The page of the claims: a table for each, from the JSON files alone."""

import json
import statistics

from claims_figure import draw
from claims_statistics import interval, percent
from claims_verdict import NAMES, by_arm, differences, to_teacher, verdict_lines


def _side(values):
    _, low, high = interval(values)
    return "above" if low > 0 else "below" if high < 0 else "no difference shown"


def sides_of(claim, point, runs):
    """One sentence: on which side of what they are compared with the arms lie, by the first measure."""
    measure, against = claim["measures"][0], runs.get((point, claim["against"]), {})
    sides: dict[str, list] = {"above": [], "below": [], "no difference shown": []}
    for arm in claim["arms"]:
        found = differences(runs.get((point, arm), {}), against, measure)
        if arm != claim["against"] and len(found) > 1:
            sides[_side(found)].append(f"{arm} ({percent(found, '+')})")
    said = [f"{side}: {', '.join(arms)}" for side, arms in sides.items() if arms]
    return f"{NAMES[measure].capitalize()} against “{claim['against']}”, {'; '.join(said)}." if said else ""


def told_first(claim, point, runs):
    """Sentences on pairs of arms that the claim names: the first measure, and recall beside it."""
    lines = []
    for arm, rival in claim.get("told_first", []):
        first, second = runs.get((point, arm), {}), runs.get((point, rival), {})
        cells = [(NAMES[each], differences(first, second, each)) for each in (claim["measures"][0], "object_recall")]
        if len(cells[0][1]) > 1:
            said = ", ".join(f"{name} {percent(values, '+')}" for name, values in cells)
            lines.append(f"“{arm}” less “{rival}”: {said}.")
    return lines


def claim_lines(name, claim, found, seeds):
    """Markdown of one claim, of which `seeds` were planned."""
    measures, runs = claim["measures"], by_arm(found["runs"])
    lines = [f"## {claim['section']}. {claim['says']}", "", *verdict_lines(claim, runs, seeds)]
    lines += [f"Counts as holding: {claim['holds'].strip()}", ""]
    lines += [f"{claim['test_rows']} test rows.", ""] if "test_rows" in claim else []
    points = list(dict.fromkeys(point for point, _ in runs))
    for point in [point for point in claim["vary"] if point in points]:
        lines += [f"### {point}", ""] if point else []
        lines += [
            line
            for said in (*told_first(claim, point, runs), sides_of(claim, point, runs))
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
            cells = [percent([run["figures"][each] for run in seeds.values()]) for each in measures]
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
                cells = [percent(differences(seeds, against, each), "+") for each in measures]
                lines.append(f"| {arm} | {len(seeds.keys() & against.keys())} | {' | '.join(cells)} |")
                if claim["measures"][0] == "chair_s" and to_teacher(seeds, "chair_s"):
                    cells = [f"*{percent(to_teacher(seeds, each), '+')}*" for each in measures]
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
        "![Curves of exact match against wrong answers and rows, and what preferences trade](claims.png)",
        "",
        "Bands and bars are those intervals. The shaded corner is where the claim on preferences holds: "
        "fewer hallucinated descriptions than the teacher, hardly fewer things found than before. A hollow mark is a "
        "student that is its own reference.",
        "",
    ]
    for name in names:
        path = results / f"{name}.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            lines += claim_lines(name, plan["claims"][name], found, len(plan["seeds"]))
    return lines


def write_page(plan, names, results, path):
    """Writes the page, and its figure beside it."""
    draw(results, path.with_suffix(".png"))
    path.write_text("\n".join(page_lines(plan, names, results)).rstrip() + "\n", encoding="utf-8")
