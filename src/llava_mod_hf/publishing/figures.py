"""The figures of a card."""

import math

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

STYLE = {"font_size": 11, "line": "#2f5d8a", "grid": "#d9d9d9"}


def finish_axes(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=STYLE["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=STYLE["font_size"] - 1)


def save_figure(figure, path):
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # inches
    # the library's version is metadata by default: without it the same numbers give the same bytes
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def plot_losses(history, path):
    """
    Writes a figure of the training loss against the optimiser step, one panel per stage.

    Args:
        history (`dict[str, list[dict]]`): `log_history` of the Trainer by name of the stage; entries without a `loss`,
            such as evaluations and the summary, are skipped.
        path (`str` or `Path`): PNG file to write.

    Raises:
        ValueError: if there is no stage, or a stage that never logged a loss.
    """
    curves = {
        stage: [(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for stage, log in history.items()
    }
    empty = [stage for stage, points in curves.items() if not points]
    if empty or not curves:
        raise ValueError(
            f"No `loss` was logged in {', '.join(empty) or 'any stage'}: give the `log_history` of at least one stage, "
            "trained for at least `logging_steps` steps."
        )
    columns = math.ceil(math.sqrt(len(curves)))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(max(4.0 * columns, 5.0), 2.9 * rows), layout="constrained")
    for index, (stage, points) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        steps, losses = zip(*points, strict=True)
        # a single point would be invisible as a line
        axes.plot(steps, losses, color=STYLE["line"], linewidth=1.5, marker="o" if len(points) < 3 else None)
        axes.set_title(stage, fontsize=STYLE["font_size"] + 1)
        axes.set_xlabel("optimiser step", fontsize=STYLE["font_size"])
        axes.set_ylabel("training loss", fontsize=STYLE["font_size"])
        axes.set_ylim(bottom=min(0.0, *losses))  # from 0, so that a flat curve looks flat
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        finish_axes(axes)
    save_figure(figure, path)


def plot_expert_load(loads, path):
    """
    Writes a figure of the experts' shares of the choices, a group of bars per layer, with perfect balance dashed.

    Args:
        loads (`dict[int, list[float]]`): as [`~llava_mod_hf.evaluation.router_use.loads_of`] returns them.
        path (`str` or `Path`): PNG file to write.

    Raises:
        ValueError: if there is no layer, or if the layers differ in the number of experts.
    """
    sizes = sorted({len(shares) for shares in loads.values()})
    if len(sizes) != 1:
        raise ValueError(
            f"The layers {list(loads)} have {sizes or 'no'} experts: give at least one mixture-of-experts layer, and "
            "the same number of experts in each."
        )
    num_experts, width = sizes[0], 0.8 / sizes[0]
    figure = Figure(figsize=(max(6.0, 2.0 + 0.8 * len(loads)), 3.4), layout="constrained")
    axes = figure.add_subplot()
    bars = [
        axes.bar(
            [group + (expert - (num_experts - 1) / 2) * width for group in range(len(loads))],
            [shares[expert] for shares in loads.values()],
            width=0.9 * width,
            color=colormaps["viridis"](0.1 + 0.75 * expert / max(num_experts - 1, 1)),
            label=f"expert {expert}",
        )
        for expert in range(num_experts)
    ]
    axes.margins(x=0.02)
    balance = axes.axhline(1 / num_experts, color="black", linestyle="--", linewidth=1.2, label="balance")
    axes.set_xticks(range(len(loads)), [str(layer) for layer in loads])
    axes.set_xlabel("layer", fontsize=STYLE["font_size"])
    axes.set_ylabel("share of choices (%)", fontsize=STYLE["font_size"])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
    finish_axes(axes)
    figure.legend(
        handles=[*bars, balance],
        loc="outside right upper",
        ncols=math.ceil(num_experts / 10),
        fontsize=STYLE["font_size"] - 1,
        frameon=False,
    )
    save_figure(figure, path)
