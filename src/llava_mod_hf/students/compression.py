"""Fewer experts: those that the routers use least are dropped, or merged into those that are most like them."""

import copy

import torch

from llava_mod_hf.students.stock_export import check_loads, empty_model, sparse_layers

WAYS = ("drop", "merge")


@torch.no_grad()
def compress_experts(model, *, loads, num_experts, how="drop"):
    """
    A student with fewer experts in each layer, the ones with the largest measured load.

    A token goes to the best of those that remain. With `"merge"` each of the others is averaged into the kept expert
    whose weights are nearest, `W = Σ_e s_e W_e / Σ_e s_e` over those that meet there, `s_e` being the load, and so are
    their rows of the router.

    Args:
        model (`LlavaModForConditionalGeneration`): a sparse student; left unchanged.
        loads (`dict[int, list[float]]`):
            By layer, each expert's share of the routers' choices, as `llava-mod evaluate` measures it (`expert_load`).
        num_experts (`int`): how many remain, fewer than there are and at least as many as a token is sent to.
        how (`str`, *optional*, defaults to `"drop"`): what becomes of the others, `"drop"` or `"merge"`.

    Returns:
        `tuple[LlavaModForConditionalGeneration, dict]`: a new model, on the same device and of the same dtype; and what
        was done, `was`, `now`, `how`, and by layer the experts that were `kept` and their `load` together.

    Raises:
        ValueError: if the model is dense, the loads do not fit, `num_experts` is out of range, or low-rank experts are
            to be merged, whose averages are of a higher rank.
    """
    layers = sparse_layers(model)
    text = model.config.text_config
    if how not in WAYS:
        raise ValueError(f"`how` is {how!r}: give one of {', '.join(WAYS)}.")
    if how == "merge" and text.expert_rank is not None:
        raise ValueError(
            f"The experts are of rank {text.expert_rank}, and an average of them is of a higher one: give `drop`."
        )
    if not text.num_experts_per_tok <= num_experts < text.num_experts:
        raise ValueError(
            f"`num_experts` is {num_experts}, of {text.num_experts} of which a token is sent to "
            f"{text.num_experts_per_tok}: give {text.num_experts_per_tok} to {text.num_experts - 1}, or make the "
            "student dense by `llava-mod export --form load`."
        )
    shares = check_loads(loads, model)
    state, kept = model.state_dict(), {}
    for layer in layers:
        prefix = f"model.language_model.layers.{layer}.mlp."
        share = shares[layer]
        kept[layer] = sorted(share.argsort(descending=True, stable=True)[:num_experts].tolist())
        # the expert is the first dimension of each, but of what low-rank experts share
        names = [name for name in state if name.startswith(f"{prefix}experts.") and ".shared." not in name]
        mixture = _mixture(share, kept[layer], [state[name] for name in names], how)
        for name in [*names, *(name for name in state if name.startswith(f"{prefix}gate."))]:
            value = state[name]
            mixed = torch.einsum("ne,e...->n...", mixture.to(value.device), value.double())
            state[name] = mixed.to(value.dtype)
    config = copy.deepcopy(model.config)
    config.text_config.num_experts = num_experts
    smaller = empty_model(type(model), config, dtype=model.dtype, attn_implementation=model.config._attn_implementation)
    smaller.load_state_dict(state)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    done = {"was": text.num_experts, "now": num_experts, "how": how, "kept": kept}
    done["load"] = {layer: round(float(shares[layer][experts].sum()), 4) for layer, experts in kept.items()}
    return smaller.to(model.device).train(model.training), done


def _mixture(share, kept, parameters, how):
    """Of which of the old experts each new one is made: `(kept, experts)`, rows sum to 1."""
    mixture = torch.zeros(len(kept), len(share), dtype=torch.float64)
    mixture[range(len(kept)), kept] = 1.0
    if how == "drop":
        return mixture
    flat = torch.cat([value.double().flatten(1).cpu() for value in parameters], dim=1)  # (experts, values of one)
    nearest = torch.cdist(flat, flat[kept]).argmin(dim=1)  # a kept one's own distance is 0
    for expert, place in enumerate(nearest.tolist()):
        mixture[place, expert] = share[expert]
    sums = mixture.sum(dim=1, keepdim=True)
    # experts that nobody chose have no load to be weighed by
    return torch.where(sums > 0, mixture / sums.clamp_min(1e-300), torch.eye(len(share), dtype=torch.float64)[kept])
