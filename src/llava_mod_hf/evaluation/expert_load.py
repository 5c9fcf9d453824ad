"""How a student's routers share the work among their experts, and the figures of a training."""

import torch
from torch.nn import functional as F

from llava_mod_hf.evaluation.answers import evaluating, inputs_for, response_batches


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
