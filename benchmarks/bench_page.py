"""The tables of docs/speed.md on all benchmarks, from the JSON files alone."""

import json

from bench_figure import CURVES, draw_curves, draw_speed, points_of
from bench_things import SIZE, TIME, against, over_floor, shown
from measuring import PACKAGES, write

BEGIN = "<!-- written by `python benchmarks/bench.py --page docs/speed.md` -->"
END = "<!-- end of what was written -->"


def read_results(folder):
    """`{name of the file: its JSON}`."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def number(value):
    """`str`: three digits that count, or all of a whole part."""
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.3g}" if value < 0.995 else f"{value:,.{digits}f}"


def with_range(ratio):
    value, low, high = map(number, ratio)
    return value if low == high else f"{value} ({low}–{high})"


def machines_of(results):
    """What results were measured on, a sentence for each machine, and how busy it was."""
    found = {}
    for name, result in results.items():
        machine = result["machine"]
        packages = ", ".join(f"{each} {machine[each]}" for each in PACKAGES if machine[each])
        chip = machine.get("gpu") or f"{machine['cores']} cores, {machine['cpu']}"
        found.setdefault(f"{chip}, {packages}", {})[name] = machine["load"]
    lines = []
    for said, loads in found.items():
        which = f": {', '.join(loads)}" if len(found) > 1 else ""
        low, high = min(loads.values()), max(loads.values())
        lines += [f"Measured on {said}{which}. Load of the machine, one minute: {low:.1f} to {high:.1f}.", ""]
    return lines


def table_of(results, things, floor_says, rival_says):
    found = shown(results, things)
    if not found:
        return []
    lines = [f"| | {floor_says} | {rival_says} |", "|---|---|---|"]
    for thing, row in found:
        ratio = over_floor(thing, row)
        floor = f"{with_range(ratio)}, {thing.floor[1]}" if ratio else ""
        rivals = [f"{with_range(each)}, {thing.rivals[name][1]}" for name, each in against(thing, row).items()]
        lines.append(f"| {thing.says} | {floor} | {'; '.join(rivals)} |")
    return [*lines, ""]


def growth(points, x_low, x_high):
    """How many times as much the last point takes as the first, or `""` where one of them is missing."""
    values = {x: value for x, value, *_ in points}
    return number(values[x_high] / values[x_low]) if {x_low, x_high} <= values.keys() else ""


def curves_table(results):
    lines = []
    for curve, (title, _, ways) in CURVES.items():
        points = points_of(results, curve)
        every = sorted({x for each in points.values() for x, *_ in each})
        if len(every) < 2:
            continue
        grown = [
            f"{name} {growth(points[way], every[0], every[-1])}" for way, (name, _) in ways.items() if way in points
        ]
        lines.append(f"| {title} | {every[0]:,}–{every[-1]:,} | {'; '.join(grown)} |")
    return ["| | from – to | grows by the factor |", "|---|---|---|", *lines, ""] if lines else []


def block_lines(results):
    """Markdown of what there are results of, between the marks."""
    lines = [BEGIN, ""]
    timed = [
        *table_of(results, TIME, "time over its floor", "speed over"),
        *table_of(results, SIZE, "memory or size over its floor", "rival's over ours"),
    ]
    if timed:
        lines += ["![Time over the floor and speed over the rival, for each benchmark](speed.png)", ""]
    lines += machines_of(results) if results else ["Not measured on an idle machine so far.", ""]
    lines += timed
    curves = curves_table(results)
    if curves:
        lines += ["![Costs against length, rows, vocabulary, experts and processes](curves.png)", "", *curves]
    if results:
        lines += ["```bash", *(result["command"] for result in results.values()), "```", ""]
    return [*lines, END]


def write_page(folder, path):
    """Replaces the block between the page's two marks, and draws the figures beside the page."""
    text, results = path.read_text(encoding="utf-8"), read_results(folder)
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"`{path}` has no block to replace: give a page with the lines `{BEGIN}` and `{END}`.")
    draw_speed(results, path.with_name("speed.png"))
    draw_curves(results, path.with_name("curves.png"))
    write(path, before + "\n".join(block_lines(results)) + after)
