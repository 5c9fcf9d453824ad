"""The figures of the speed benchmarks, from the JSON files alone: times over floors, speed over rivals, and curves."""

from bench_things import KINDS, SIZE, TIME, against, over_floor, shown
from claims_figure import INK, MUTED, RULE
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

OURS = "#0969da"

COLORS = {"trl": "#bc4c00", "authors": "#c4192b", "transformers": "#8250df", "plain": "#656d76"}

# of each curve: its title, its axis, and `{way: (what it is called, color)}`
LOSS = {
    "ours": ("ours", OURS),
    "trl": ("TRL's kernel, as it masks", "#bc4c00"),
    "trl_response": ("TRL's kernel, response", "#d4a72c"),
    "authors": ("the authors' formula", "#c4192b"),
    "selection": ("plain autograd, selected", "#656d76"),
    "floor": ("matrix products", INK),
}
BLOCK = {
    "ours": ("ours", OURS),
    "grouped_mm": ("transformers' `grouped_mm`", "#8250df"),
    "eager": ("a loop over experts", "#c4192b"),
    "floor": ("a dense FFN, top-k times", INK),
}
CURVES = {
    "length": ("Mimic loss: length", "positions, 64 of them supervised", LOSS),
    "rows": ("Mimic loss: supervised rows", "supervised of 1,024 positions", LOSS),
    "vocabulary": ("Mimic loss: vocabulary", "tokens of the vocabulary", LOSS),
    "step": (
        "Mimic step: length",
        "positions",
        {
            "live": ("ours, live teacher", OURS),
            "cached": ("ours, cached", "#54aeff"),
            "both": ("and features cached", "#1a7f37"),
            "authors": ("the authors' step", "#c4192b"),
            "sft": ("fine-tuning", "#656d76"),
            "floor": ("matrix products", INK),
        },
    ),
    "experts": ("Experts: their number", "experts, top-2", BLOCK),
    "top_k": ("Experts: top-k", "k of 8 experts", BLOCK),
    "processes": (
        "Processes, batch of each fixed",
        "processes",
        {"ours": ("ours, live teacher", OURS), "sft": ("TRL's SFTTrainer", "#bc4c00")},
    ),
}


def _plain(axes, axis):
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.grid(axis=axis, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def _short(value, _=None):
    """Of a tick: 0.5, 50, 2k, and 4k of 4,096."""
    kilo = 1024 if value % 1024 == 0 else 1000
    return f"{value / kilo:g}k" if value >= 1000 else f"{value:g}"


def _log_axis(axis, values):
    """Ticks at 1, 2, 5 times powers of ten where there are few of those, else at the powers."""
    low, high = min(values), max(values)
    steps = (1, 2, 5) if high / low < 100 else (1, 3) if high / low < 1000 else (1,)
    ticks = [step * 10.0**power for power in range(-7, 8) for step in steps]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if 0.8 * low <= tick <= 1.25 * high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_short))


def _range_of(axes, y, ratio, color, marker):
    value, low, high = ratio
    axes.plot([low, high], [y, y], color=color, linewidth=2.2, alpha=0.45, solid_capstyle="round")
    axes.plot([value], [y], marker=marker, markersize=6, color=color, markeredgecolor="white", linestyle="none")


def draw_speed(results, path):
    """
    Writes a figure with a line for each thing that has been measured: over its floor, and over its rivals.

    Args:
        results (`dict[str, dict]`): the JSON of each benchmark by the name of its file.
        path (`Path`): PNG file to write; none is if nothing has been measured.
    """
    groups = [found for things in (TIME, SIZE) if (found := shown(results, things))]
    if not groups:
        return
    lines = [line for found in groups for line in (*found, None)][:-1]
    figure = Figure(figsize=(9.6, 1.2 + 0.26 * len(lines)), facecolor="white", layout="constrained")
    floors, rivals = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [1, 1.15]})
    seen, kinds = ([1.0], [1.0]), []
    for y, line in enumerate(lines):
        if line is None:
            for axes in (floors, rivals):
                axes.axhline(y, color=MUTED, linewidth=0.8)
            continue
        thing, row = line
        if ratio := over_floor(thing, row):
            _range_of(floors, y, ratio, OURS, "o")
            seen[0].extend(ratio)
        for name, each in against(thing, row).items():
            kind = thing.rivals[name][0]
            _range_of(rivals, y, each, COLORS[kind], "D")
            seen[1].extend(each)
            kinds.append(kind)
    titles = ("Over its floor: lower is better, 1 is the least", "Rival over ours: right of 1, ours is better")
    for axes, title, values in zip((floors, rivals), titles, seen, strict=True):
        axes.set_xscale("log")
        axes.set_xlim(0.8 * min(values), 1.25 * max(values))
        _log_axis(axes.xaxis, [*axes.get_xlim()])
        axes.axvline(1, color=INK, linewidth=0.9)
        axes.set_title(title, loc="left", fontsize=10.5, color=INK)
        _plain(axes, "both")
    floors.set_yticks(
        [y for y, line in enumerate(lines) if line],
        [line[0].says.replace("`", "") for line in lines if line],
        color=INK,
    )
    floors.tick_params(axis="y", length=0, labelcolor=INK, labelsize=9.5)
    rivals.tick_params(axis="y", length=0)
    floors.set_ylim(len(lines) - 0.4, -0.6)
    marks = [(kind, {"marker": "D", "linestyle": "none", "color": COLORS[kind]}) for kind in KINDS if kind in kinds]
    handles = [Line2D([], [], **style, label=f"over {KINDS[kind]}") for kind, style in marks]
    if handles:
        figure.legend(handles=handles, loc="outside lower right", ncols=4, fontsize=9, frameon=False, labelcolor=INK)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def points_of(results, curve):
    """`{way: [(x, value, low, high)]}` of a curve, in the order of the axis."""
    found = {}
    for row in results.get("curves", {"rows": []})["rows"]:
        if row["curve"] == curve:
            found.setdefault(row["name"], []).append((row["x"], row["value"], row["low"], row["high"]))
    return {way: sorted(points) for way, points in found.items()}


def _curve(axes, curve, points):
    title, label, ways = CURVES[curve]
    for way, (name, color) in ways.items():
        if way not in points:
            continue
        x, value, low, high = zip(*points[way], strict=True)
        floor = way == "floor"
        style = {"linestyle": "--"} if floor else {"marker": "o", "markersize": 3.5}
        axes.plot(x, value, color=color, label=name.replace("`", ""), linewidth=1.2 if floor else 1.6, **style)
        if not floor:
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(label, color=MUTED, fontsize=9.5)
    axes.set_ylabel("seconds", color=MUTED, fontsize=9.5)
    _plain(axes, "both")
    every = [x for each in points.values() for x, *_ in each]
    values = [value for each in points.values() for _, value, *_ in each]
    if curve == "processes":
        axes.set_xticks(sorted(set(every)))
        axes.set_ylim(bottom=0)
    else:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted(set(every)), [_short(x) for x in sorted(set(every))])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        _log_axis(axes.yaxis, values)
    place = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.17), "ncols": 2, "columnspacing": 1.0}
    axes.legend(**place, fontsize=8.5, frameon=False, labelcolor=INK)


def draw_curves(results, path):
    """Writes a figure with a panel for each curve of `curves.json`, if there is one."""
    curves = [(curve, points) for curve in CURVES if (points := points_of(results, curve))]
    if not curves:
        return
    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.7 * rows), facecolor="white", layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_visible(False)
    for axes, (curve, points) in zip(panels, curves, strict=False):
        axes.set_visible(True)
        _curve(axes, curve, points)
    figure.savefig(path, dpi=110, metadata={"Software": None})
