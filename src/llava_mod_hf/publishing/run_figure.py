"""The picture of runs side by side: a panel of curves for each figure, and a map of each run's experts over time."""

import math

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llava_mod_hf.publishing.figures import STYLE, finish_axes, save_figure

COLUMNS = 3
FIRST = ("loss", "kl", "lm_loss", "rewards/margins", "rewards/accuracies", "learning_rate", "tokens_per_second")

# counters, and what a run cost as a whole: no curves
LEFT_OUT = ("num_tokens", "num_input_tokens_seen", "total_flos")
LEFT_OUT_ENDS = ("_runtime", "_samples_per_second", "_steps_per_second", "_num_tokens")


def is_curve(name):
    """Whether a figure that was logged says how a run goes, and not what it cost."""
    # `train_…` is logged once, of the whole run
    return name not in LEFT_OUT and not name.endswith(LEFT_OUT_ENDS) and not name.startswith("train_")


def panels(curves):
    """
    Which figures share a panel: what is logged of training, and the same of evaluations.

    Args:
        curves (`dict[str, dict]`): figure → points, by name of the run.

    Returns:
        `dict[str, list[str]]`: title of the panel → names of figures, that of training first.
    """
    names = {name for run in curves.values() for name in run}
    found = {}
    for name in sorted(filter(is_curve, names), key=lambda name: (name.startswith("eval_"), name)):
        found.setdefault(name.removeprefix("eval_"), []).append(name)
    return dict(sorted(found.items(), key=lambda item: _place(*item)))


def _place(title, names):
    first = FIRST.index(title) if title in FIRST else len(FIRST)
    return first, names[0].startswith("eval_"), title


def draw_runs(curves, routers, path):
    """
    Writes the picture. Of several runs each has its colour; evaluations are dashed.

    Args:
        curves (`dict[str, dict[str, list[tuple[int, float]]]]`): figure → steps and values, by name of the run.
        routers (`dict[str, list[dict]]`): by name of the run `step` and `layers`: index → figures with a `load`.
        path (`str` or `Path`): PNG file to write.
    """
    found = panels(curves)
    colors = {name: colormaps["tab10"](number % 10) for number, name in enumerate(curves)}
    maps = {name: lines for name, lines in routers.items() if lines}
    rows = math.ceil(len(found) / COLUMNS)
    heights = [2.8] * rows + [1.0 + 0.18 * len(_experts(lines)) for lines in maps.values()]
    figure = Figure(figsize=(4.4 * COLUMNS, sum(heights) + 0.4), layout="constrained")
    grid = figure.add_gridspec(len(heights), COLUMNS, height_ratios=heights)
    for number, (title, names) in enumerate(found.items()):
        axes = figure.add_subplot(grid[divmod(number, COLUMNS)])
        _draw_panel(axes, title, names, curves, colors)
    for number, (name, lines) in enumerate(maps.items()):
        _draw_loads(figure, figure.add_subplot(grid[rows + number, :]), name, lines)
    if len(curves) > 1:
        handles = [figure.axes[0].plot([], [], color=color, label=name)[0] for name, color in colors.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4), frameon=False)
    save_figure(figure, path)


def _draw_panel(axes, title, names, curves, colors):
    for run, points_of in curves.items():
        for name in names:
            points = points_of.get(name, [])
            evaluated = name.startswith("eval_")
            axes.plot(
                [step for step, _ in points],
                [value for _, value in points],
                color=colors[run],
                linewidth=1.4,
                linestyle="--" if evaluated else "-",
                # a single point would be invisible as a line
                marker="o" if evaluated or len(points) < 3 else None,
                markersize=3,
            )
    both = " (dashed: evaluation)" if len(names) > 1 else " (evaluation)" if names[0].startswith("eval_") else ""
    axes.set_title(title + both, fontsize=STYLE["font_size"] - 1)
    axes.set_xlabel("step", fontsize=STYLE["font_size"] - 2)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    finish_axes(axes)


def _experts(lines):
    """`list[tuple[str, int]]`: layer and expert of each row of a map."""
    layers = lines[-1]["layers"]
    return [(layer, expert) for layer, figures in layers.items() for expert in range(len(figures["load"]))]


def load_map(lines):
    """
    Each expert's load over time, as a multiple of an even one.

    Args:
        lines (`list[dict]`): of one run.

    Returns:
        `list[list[float]]`: per layer and expert, per line; not a number where a line has no such layer.
    """
    rows = []
    for layer, expert in _experts(lines):
        loads = [line["layers"].get(layer, {}).get("load", []) for line in lines]
        rows.append([load[expert] * len(load) if expert < len(load) else math.nan for load in loads])
    return rows


def _draw_loads(figure, axes, name, lines):
    rows, experts = load_map(lines), _experts(lines)
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="magma", vmin=0.0)
    firsts = [number for number, (_, expert) in enumerate(experts) if expert == 0]
    axes.set_yticks(firsts, [f"layer {experts[number][0]}" for number in firsts])
    for number in firsts[1:]:
        axes.axhline(number - 0.5, color="white", linewidth=1.5)
    places = sorted({round(i * (len(lines) - 1) / 5) for i in range(6)})
    axes.set_xticks(places, [str(lines[place]["step"]) for place in places])
    axes.set_title(f"{name}: load of each expert (1: even, 0: dead)", fontsize=STYLE["font_size"] - 1)
    axes.set_xlabel("step", fontsize=STYLE["font_size"] - 2)
    axes.tick_params(labelsize=STYLE["font_size"] - 1)
    figure.colorbar(image, ax=axes, pad=0.01)
