"""How a student's routers share the work among their experts: counts of choices, and the figures that they give."""

import math

import torch

from llava_mod_hf.model.moe_llava_mod import choose_experts

MODALITIES = ("picture", "prompt", "answer")

OVERLOAD = 1.5  # times an even share: what is beyond it drops with the authors' capacity factor

COLLAPSED = 0.99  # share of the choices that as many experts have as a token is sent to


def modalities(input_ids, attention_mask, answers, image_token):
    """
    What each token is.

    Args:
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch, sequence)`).
        answers (`torch.BoolTensor` of the same shape): tokens of answers, which are supervised.
        image_token (`int`): the placeholder of an image feature.

    Returns:
        `torch.LongTensor` of shape `(batch * sequence,)`: index in [`MODALITIES`]; of padding, their number.
    """
    found = torch.where(answers.bool(), 2, 1)
    found = torch.where(input_ids == image_token, 0, found)
    return torch.where(attention_mask.bool(), found, len(MODALITIES)).flatten()


def choices_of(router_logits, top_k, biases):
    """
    The experts that routers choose.

    Args:
        router_logits (`tuple[torch.FloatTensor]`): per layer `(tokens, experts)`.
        top_k (`int`): experts that a token is sent to.
        biases (`list[torch.FloatTensor | None]`): of each layer's router, as
            [`~llava_mod_hf.students.router_bias.router_biases`] has them.

    Returns:
        `list[torch.LongTensor]`: per layer `(tokens, top_k)`, the first choice first.
    """
    return [
        choose_experts(logits, top_k, None if bias is None else bias.to(logits.device))[1]
        for logits, bias in zip(router_logits, biases, strict=True)
    ]


def count_choices(chosen, num_experts, groups, num_groups):
    """
    How often each expert is chosen.

    Args:
        chosen (`list[torch.LongTensor]`): of [`choices_of`].
        num_experts (`int`): of a layer.
        groups (`torch.LongTensor` of shape `(tokens,)`): which tokens are counted together; `num_groups` of those that
            do not count.
        num_groups (`int`).

    Returns:
        `torch.LongTensor` of shape `(layers, groups, experts)`.
    """
    counts = []
    for indices in chosen:
        places = (groups[:, None] * num_experts + indices).flatten()  # (tokens * k)
        found = places.new_zeros((num_groups + 1) * num_experts).scatter_add_(0, places, torch.ones_like(places))
        counts.append(found.view(-1, num_experts)[:num_groups])
    return torch.stack(counts)


def sum_entropy(router_logits, groups, num_groups):
    """
    The entropy of each token's distribution over the experts, in nats, summed over tokens.

    Args:
        router_logits (`tuple[torch.FloatTensor]`): per layer `(tokens, experts)`.
        groups, num_groups: as in [`count_choices`].

    Returns:
        `torch.FloatTensor` of shape `(layers, groups)`.
    """
    sums = []
    for logits in router_logits:
        log_p = logits.float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        sums.append(entropy.new_zeros(num_groups + 1).scatter_add_(0, groups, entropy)[:num_groups])
    return torch.stack(sums)


def shares(choices):
    """`list[float]`: each expert's share of the choices."""
    return [count / sum(choices) for count in choices]


def router_figures(choices, entropy, tokens):
    """
    What a layer's router did with its tokens. Entropies are shares of log E, of E experts: 1 is even.

    Args:
        choices (`list[int]`): of each expert.
        entropy (`float`): of the tokens' distributions, summed.
        tokens (`float`): how many.

    Returns:
        `dict`: `load`, each expert's share of the choices; `max_load`, the largest; `load_entropy`; `entropy`, the mean
        of the tokens; `dead_experts`, the share of experts that no token was sent to; and `overloaded_experts`, of
        those with more than [`OVERLOAD`] times an even load.
    """
    load = shares(choices)
    most = math.log(len(load)) or 1.0  # of a single expert all entropies are 0
    return {
        "load": load,
        "max_load": max(load),
        "load_entropy": -sum(share * math.log(share) for share in load if share) / most,
        "entropy": entropy / tokens / most,
        "dead_experts": load.count(0.0) / len(load),
        "overloaded_experts": sum(share * len(load) > OVERLOAD for share in load) / len(load),
    }


def has_collapsed(load, top_k):
    """
    Whether a router sends its tokens to the same experts, whatever they are.

    Args:
        load (`list[float]`): each expert's share of the choices.
        top_k (`int`): experts that a token is sent to.
    """
    return top_k < len(load) and sum(sorted(load)[-top_k:]) > COLLAPSED
