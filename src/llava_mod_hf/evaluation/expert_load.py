"""How a student's routers share the work among their experts, and the figures of a training."""

import math

import torch

from llava_mod_hf.evaluation.answers import evaluating, inputs_for, response_batches


def count_choices(router_logits, top_k, counted):
    """
    How often each expert is chosen.

    Args:
        router_logits (`tuple[torch.FloatTensor]`): per layer `(tokens, experts)`.
        top_k (`int`): experts that a token is sent to.
        counted (`torch.BoolTensor` of shape `(…, tokens)`): tokens that count; of several kinds, a row for each.

    Returns:
        `torch.LongTensor` of shape `(layers, …, experts)`.
    """
    counts = []
    for logits in router_logits:
        chosen = logits.softmax(-1).topk(top_k, dim=-1).indices.flatten()  # (tokens * k), as the router chooses
        choices = counted.to(chosen).repeat_interleave(top_k, dim=-1)  # (…, tokens * k)
        zeros = chosen.new_zeros(*counted.shape[:-1], logits.shape[-1])
        counts.append(zeros.scatter_add_(-1, chosen.expand_as(choices), choices))
    return torch.stack(counts)


def sum_entropy(router_logits, counted):
    """
    The entropy of each token's distribution over the experts, in nats, summed over tokens.

    Args:
        router_logits: as in [`count_choices`].
        counted (`torch.BoolTensor` of shape `(tokens,)`): tokens that count.

    Returns:
        `torch.FloatTensor` of shape `(layers,)`.
    """
    sums = []
    for logits in router_logits:
        log_p = logits.float().log_softmax(-1)
        sums.append((-(log_p.exp() * log_p).sum(-1) * counted).sum())
    return torch.stack(sums)


def router_figures(choices, entropy, tokens):
    """
    What a layer's router did with its tokens. Entropies are shares of log E, of E experts: 1 is even.

    Args:
        choices (`list[int]`): of each expert.
        entropy (`float`): of the tokens' distributions, summed.
        tokens (`float`): how many.

    Returns:
        `dict`: `load`, each expert's share of the choices; `max_load`, the largest; `load_entropy`; `entropy`, the mean
        of the tokens; and `dead_experts`, the share of experts that no token was sent to.
    """
    load = [count / sum(choices) for count in choices]
    most = math.log(len(load)) or 1.0  # of a single expert all entropies are 0
    return {
        "load": load,
        "max_load": max(load),
        "load_entropy": -sum(share * math.log(share) for share in load if share) / most,
        "entropy": entropy / tokens / most,
        "dead_experts": load.count(0.0) / len(load),
    }


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
            choices = count_choices(outputs.router_logits, top_k, torch.stack([real & ~image, real & image]))
            for layer, chosen in zip(layers, choices.cpu(), strict=True):
                counts[layer] += chosen
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
