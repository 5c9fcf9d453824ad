"""The figure of the claims, from the JSON files alone: what noise and rows do to an arm, and what preferences trade."""

import json
import re

from claims_statistics import interval
from claims_verdict import by_arm, differences, to_teacher
from matplotlib.figure import Figure

INK, MUTED, RULE = "#1f2328", "#656d76", "#d8dee4"

COLORS = {
    "supervised": "#656d76",
    "distilled, teacher of clean rows": "#1a7f37",
    "distilled, teacher of ten times the rows": "#0969da",
    "distilled, teacher of as many rows": "#bc4c00",
    "fine-tuned on the teacher's answers": "#8250df",
}

# what a way to prefer is made of: the form is of whose pairs, the color of which loss
FORMS = {"own samples": "o", "teacher's samples": "D", "swapped things": "s", "added things": "^"}

LOSSES = {
    "fine-tuning on the chosen": "#656d76",
    "DPO + 0.2": "#54aeff",
    "DPO +": "#0969da",
    "DPO,": "#c4192b",
    "KTO": "#8250df",
    "margin": "#bf3989",
}

MEASURES = ("object_recall", "chair_s")

REACH = 15  # points; a way further from the stage before is told in the legend, for it would squeeze all others


def read(results, name):
    """`{(point, arm): {seed: run}}` of a claim, empty if it has not run."""
    path = results / f"{name}.json"
    return by_arm(json.loads(path.read_text(encoding="utf-8"))["runs"]) if path.is_file() else {}


def wrong_share(point):
    """Per cent of wrong answers that a point of `noise` stands for."""
    found = re.match(r"(\d+) %", point)
    return int(found[1]) if found else 0


def curve(runs, arm, position):
    """`[(position, mean, low, high)]` of an arm's exact match in per cent, where it has two seeds at least."""
    points = [
        (position(point), *interval([100 * run["figures"]["exact_match"] for run in seeds.values()]))
        for (point, name), seeds in runs.items()
        if name == arm and len(seeds) > 1
    ]
    return sorted(points)


def _plain(axes, title, x, y):
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x, color=MUTED)
    axes.set_ylabel(y, color=MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def _curves(axes, curves):
    for arm, points in curves.items():
        if points:
            x, mean, low, high = zip(*points, strict=True)
            axes.plot(x, mean, marker="o", markersize=4, color=COLORS[arm], label=arm)
            axes.fill_between(x, low, high, color=COLORS[arm], alpha=0.15, linewidth=0)


def _several(points):
    """Whether there are two at least: a curve of one says nothing about its axis."""
    return len({point for point, _ in points}) > 1


def _noise(axes, runs):
    _curves(axes, {arm: curve(runs, arm, wrong_share) for arm in COLORS})
    _plain(axes, "When the training answers are wrong", "wrong answers in training, %", "exact match, %")


def _rows(axes, few, noise):
    """The clean rows of `noise` are the last point: the same arms with all rows."""
    found = few | {("6,000 rows", arm): seeds for (point, arm), seeds in noise.items() if point == "clean"}
    arms = ("supervised", "distilled, teacher of clean rows")
    _curves(axes, {arm: curve(found, arm, lambda point: int(point.split()[0].replace(",", ""))) for arm in arms})
    axes.set_xscale("log")
    _plain(axes, "When the rows are few, and right", "training rows", "exact match, %")


def _preference(axes, runs):
    """Each way as its differences to the stage before; its teacher as a star; where the claim holds is shaded."""
    before = runs[("", "before")]
    teacher = [[-100 * value for value in to_teacher(before, each)] for each in MEASURES]
    for form, arm in sorted((next(k for k in FORMS if arm.startswith(k)), arm) for _, arm in runs if arm != "before"):
        pairs = [[100 * each for each in differences(runs["", arm], before, name)] for name in MEASURES]
        if len(pairs[0]) < 2:
            continue
        (x, x_low, _), (y, y_low, _) = map(interval, pairs)
        color = next(color for name, color in LOSSES.items() if name in arm)
        own = ", itself" in arm  # its own reference: hollow
        style = {"fmt": FORMS[form], "color": color, "markerfacecolor": "white" if own else color, "markersize": 7}
        if max(abs(x), abs(y)) > REACH:
            axes.errorbar([], [], [], [], **style, label=f"{arm}: outside, at {x:+.0f} and {y:+.0f}")
        else:
            axes.errorbar(x, y, xerr=x - x_low, yerr=y - y_low, **style, elinewidth=0.8, label=arm)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    (x, *_), (y, *_) = map(interval, teacher)
    axes.plot(x, y, marker="*", markersize=13, color=INK, linestyle="none", label="the teacher")
    axes.fill_betweenx([axes.get_ylim()[0], y], -1, axes.get_xlim()[1], color="#1a7f37", alpha=0.08, linewidth=0)
    axes.margins(0)
    _plain(
        axes, "What preferences buy, against the stage before",
        "things found, points", "hallucinated descriptions, points",
    )  # fmt: skip


def draw(results, path):
    """Writes the figure as a PNG file; what has not run is not in it, nor a curve of one point."""
    noise, few, preference = (read(results, name) for name in ("noise", "few_rows", "preference"))
    parts = [(noise, _noise)] if _several(noise) else []
    parts += [(few, lambda axes, runs: _rows(axes, runs, noise))] if _several(few) else []
    parts += [(preference, _preference)] if preference else []
    figure = Figure(figsize=(5 * len(parts), 7.2), facecolor="white", layout="constrained")
    for axes, (runs, part) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        part(axes, runs)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), fontsize=8, frameon=False, labelcolor=INK)
    figure.savefig(path, dpi=110, metadata={"Software": None})
