"""How a student's routers share the work among their experts, and the figures of a training."""

import math

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch.nn import functional as F

from llava_mod_hf.evaluation import evaluating, inputs_for, response_batches

STYLE = {"font_size": 11, "line": "#2f5d8a", "grid": "#d9d9d9"}


def _count_choices(model, processor, dataset, batch_size):
    """Choices of each expert by text and by image tokens: `{layer: (2, experts)}`, padding excluded."""
    layers = getattr(model.config, "moe_layers", [])
    if not layers:
        return {}
    num_experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    counts = {layer: torch.zeros(2, num_experts, dtype=torch.int64) for layer in layers}
    with evaluating(model):
        for batch in response_batches(processor, dataset, batch_size=batch_size, description="Counting choices"):
            outputs = model(**inputs_for(model, batch), output_router_logits=True, logits_to_keep=1)
            real = batch["attention_mask"].bool().flatten()  # (batch * sequence,)
            image = (batch["input_ids"] == model.config.image_token_index).flatten()
            for layer, logits in zip(layers, outputs.router_logits, strict=True):
                chosen = logits.softmax(-1).topk(top_k, dim=-1).indices.cpu()  # (tokens, k), as the router chooses
                choices = F.one_hot(chosen, num_experts).sum(1)  # (tokens, experts)
                counts[layer][0] += choices[real & ~image].sum(0)
                counts[layer][1] += choices[real & image].sum(0)
    return counts


def _shares(counts):
    return (counts.double() / counts.sum()).tolist()


def expert_load(model, processor, dataset, *, batch_size=128):
    """
    Share of the routers' choices that falls on each expert; 1/E for each of E experts is perfect balance.

    Every token of prompt, image and answer makes `num_experts_per_tok` choices, which all count; padding makes none.

    Args:
        model (`LlavaModForConditionalGeneration`): a student; a dense one has no routers.
        processor (`ProcessorMixin`): its processor.
        dataset (`datasets.Dataset`): columns `images`, `prompt` and `completion`.
        batch_size (`int`, *optional*, defaults to 128).

    Returns:
        `dict[int, list[float]]`: shares by index of the layer, summing to 1 in each; empty for a dense model.
    """
    counts = _count_choices(model, processor, dataset, batch_size)
    return {layer: _shares(count.sum(0)) for layer, count in counts.items()}


def expert_load_by_modality(model, processor, dataset, *, batch_size=128):
    """
    [`expert_load`] of text tokens and of image tokens apart.

    Returns:
        `dict[str, dict[int, list[float]]]`: by `"text"` and `"image"`, without one that has no token.
    """
    counts = _count_choices(model, processor, dataset, batch_size)
    loads = {
        name: {layer: _shares(count[row]) for layer, count in counts.items() if count[row].any()}
        for row, name in enumerate(("text", "image"))
    }
    return {name: load for name, load in loads.items() if load}


def _finish_axes(axes):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=STYLE["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=STYLE["font_size"] - 1)


def _save(figure, path):
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
        _finish_axes(axes)
    _save(figure, path)


def plot_expert_load(loads, path):
    """
    Writes a figure of the experts' shares of the choices, a group of bars per layer, with perfect balance dashed.

    Args:
        loads (`dict[int, list[float]]`): as [`expert_load`] returns them.
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
    _finish_axes(axes)
    figure.legend(
        handles=[*bars, balance],
        loc="outside right upper",
        ncols=math.ceil(num_experts / 10),
        fontsize=STYLE["font_size"] - 1,
        frameon=False,
    )
    _save(figure, path)
