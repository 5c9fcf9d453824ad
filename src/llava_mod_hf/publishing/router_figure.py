"""The picture of what students' routers do with a data set's tokens: a row of maps for each student."""

import math

from matplotlib.figure import Figure

from llava_mod_hf.publishing.figures import STYLE, finish_axes, save_figure

ALL = "all"


def load_columns(layers):
    """
    The load of each expert, as a multiple of an even one, of all tokens and of each modality and task.

    Args:
        layers (`dict[str, dict]`): of [`~llava_mod_hf.evaluation.router_use.router_use`].

    Returns:
        `tuple[list[str], list[list[float]]]`: names of the columns; and per layer and expert a row, not a number
        where a layer has no token of a column.
    """
    splits = ("by_modality", "by_task")
    names = {
        split: list(dict.fromkeys(name for each in layers.values() for name in each.get(split, ()))) for split in splits
    }
    rows = []
    for figures in layers.values():
        groups = [figures, *(figures[split].get(name) for split in splits for name in names[split])]
        for expert in range(len(figures["load"])):
            loads = [math.nan if group is None else group["load"][expert] * len(group["load"]) for group in groups]
            rows.append(loads)
    return [ALL, *(name for split in splits for name in names[split])], rows


def given_rows(matrices):
    """
    Rows of shares as shares of their sum, one matrix below the other.

    Args:
        matrices (`list`): of each layer, or `None`.

    Returns:
        `list[list[float]]`: zeros where nothing was chosen, and no numbers in place of `None`.
    """
    size = max(len(matrix) for matrix in matrices if matrix is not None)
    rows = []
    for matrix in matrices:
        for row in [[math.nan] * size] * size if matrix is None else matrix:
            total = sum(row)
            rows.append([value / total if total else 0.0 for value in row] if matrix is not None else row)
    return rows


def _partners(together):
    """Of the tokens that chose an expert, the share that chose each other one as well."""
    found = []
    for number, row in enumerate(together):
        own = row[number]
        found.append([math.nan if place == number else value / own if own else 0.0 for place, value in enumerate(row)])
    return found


def draw_routers(used, path):
    """
    Writes the picture: the rows of all maps are the experts of the layers.

    Args:
        used (`dict[str, dict]`): of [`~llava_mod_hf.evaluation.router_use.router_use`], by name of the student.
        path (`str` or `Path`): PNG file to write.
    """
    heights = [1.6 + 0.2 * sum(len(each["load"]) for each in one["layers"].values()) for one in used.values()]
    widths = [max(4.0, max(1.0 + 0.45 * len(load_columns(one["layers"])[0]) for one in used.values())), 2.6, 2.6, 2.4]
    figure = Figure(figsize=(sum(widths) + 1.6, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), len(widths), height_ratios=heights, width_ratios=widths)
    for number, (name, one) in enumerate(used.items()):
        axes = [figure.add_subplot(grid[number, column]) for column in range(len(widths))]
        _draw_row(figure, axes, name, one["layers"])
    save_figure(figure, path)


def _draw_row(figure, axes, name, layers):
    names, loads = load_columns(layers)
    _draw_map(figure, axes[0], loads, names, f"{name}: load (1: even, 0: dead)")
    partners = [row for each in layers.values() for row in _partners(each["together"])]
    experts = [str(expert) for expert in range(max(len(each["load"]) for each in layers.values()))]
    _draw_map(figure, axes[1], partners, experts, "chosen together with", limit=1.0)
    if len(layers) > 1:
        following = given_rows([each.get("next_layer") for each in layers.values()])
        _draw_map(figure, axes[2], following, experts, "first choice, next layer", limit=1.0)
    else:
        axes[2].set_axis_off()
    _draw_distances(axes[3], [each.get("distance") for each in layers.values()], len(loads))
    firsts, labels, place = [], [], 0
    for layer, each in layers.items():
        firsts.append(place)
        labels.append(f"layer {layer}")
        place += len(each["load"])
    for each in axes:
        each.set_yticks(firsts, labels if each is axes[0] else [])
        each.tick_params(labelsize=STYLE["font_size"] - 2)
        for first in firsts[1:]:
            each.axhline(first - 0.5, color="white" if each is not axes[3] else STYLE["grid"], linewidth=1.5)


def _draw_map(figure, axes, rows, columns, title, *, limit=None):
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="magma", vmin=0.0, vmax=limit)
    long = max(map(len, columns)) > 2
    axes.set_xticks(range(len(columns)), columns, rotation=40 if long else 0, ha="right" if long else "center")
    axes.set_title(title, fontsize=STYLE["font_size"] - 2)
    figure.colorbar(image, ax=axes, pad=0.02)


def _draw_distances(axes, distances, num_rows):
    flat = [math.nan if each is None else value for each in distances for value in each or [0.0]]
    axes.set_title("distance from the mean expert", fontsize=STYLE["font_size"] - 2)
    if len(flat) != num_rows:  # of quantised experts it is unknown
        axes.set_axis_off()
        return
    axes.barh(range(num_rows), flat, color=STYLE["line"], height=0.7)
    axes.set_ylim(num_rows - 0.5, -0.5)
    axes.set_xlim(left=0)
    finish_axes(axes)
    axes.grid(axis="x", color=STYLE["grid"], linewidth=0.8)
    axes.grid(axis="y", visible=False)
