"""Sparse upcycling: a dense FFN becomes identical experts, so that the sparse student starts as the dense one."""

import copy

import torch

from llava_mod_hf.model.configuration_llava_mod import LlavaModConfig
from llava_mod_hf.model.modeling_llava_mod import LlavaModForConditionalGeneration

PLACEMENTS = {
    "alternate": lambda n: list(range(0, n, 2)),  # the paper's; `sparse` in the authors' code
    "all": lambda n: list(range(n)),
    "first_half": lambda n: list(range(n // 2)),
    "second_half": lambda n: list(range(n // 2, n)),
}


def moe_layer_indices(layers, num_layers):
    """
    Indices of the mixture-of-experts layers.

    Args:
        layers (`str` or `list[int]`): `"alternate"`, `"all"`, `"first_half"`, `"second_half"`, or the indices.
        num_layers (`int`): layers of the language model.

    Raises:
        ValueError: if `layers` is another string or selects no layer.
    """
    if isinstance(layers, str):
        if layers not in PLACEMENTS:
            raise ValueError(f"`layers` is {layers!r}: give one of {', '.join(PLACEMENTS)}, or a list of indices.")
        layers = PLACEMENTS[layers](num_layers)
    if not layers:
        raise ValueError(f"No layer of the {num_layers} is selected for experts: give at least one.")
    return sorted(layers)


def sparse_config(model, **moe_fields):
    """The config of a sparse student with the given mixture-of-experts fields, from a dense LLaVA's."""
    known = LlavaModConfig.known_fields() - {"architectures"}
    values = {name: value for name, value in model.config.to_dict().items() if name in known}
    return LlavaModConfig(**values, **moe_fields)


def _expert_weights(block, prefix, weights):
    """The block's parameters that the dense FFN determines: identical experts, or the one that they share."""
    dense = {name: weights.pop(name) for name in list(weights) if name.startswith(prefix)}
    block_weights = {}
    if hasattr(block.experts, "shared"):
        block_weights |= {name.replace(prefix, f"{prefix}experts.shared."): value for name, value in dense.items()}
    else:
        for packed, parts in block.experts.sources(prefix).items():
            stacked = torch.cat([dense[part] for part in parts])
            block_weights[f"{prefix}experts.{packed}"] = stacked.expand(block.experts.num_experts, *stacked.shape)
    if hasattr(block, "residual_mlp"):
        block_weights |= {name.replace(prefix, f"{prefix}residual_mlp."): value for name, value in dense.items()}
    return block_weights


def _check_block(block, mlp, name):
    """The experts are read from the FFN's parts: what it does between them shows in its output alone."""
    parameter = next(mlp.parameters())
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, block.gate.weight.shape[1], generator=generator).to(parameter.device, parameter.dtype)
    training, (found, expected) = mlp.training, (block.eval()(probe), mlp.eval()(probe))
    mlp.train(training)
    tolerance = max(1e-4, 10 * torch.finfo(parameter.dtype).eps) * expected.abs().max()
    if (found - expected).abs().max() > tolerance:
        raise ValueError(
            f"`{name}` is a {type(mlp).__name__} that does more than its linear layers and its activation: experts "
            "cannot take its place."
        )


# parameters: one for each field of the config that it sets
# lines: a third of them are the parameters' descriptions
@torch.no_grad()
def upcycle(
    model,
    *,
    layers="alternate",
    num_experts=4,
    num_experts_per_tok=2,
    expert_rank=None,
    use_residual=False,
    router_aux_loss_coef=0.01,
    router_aux_loss_type="switch",
    router_z_loss_coef=0.0,
    seed=0,
):
    """
    A sparse student whose experts are all copies of the dense FFN (Komatsuzaki et al., 2023; paper, section 3.1).

    The gates of a token sum to 1 and its experts are equal, so the logits are the dense model's.

    Args:
        model (`LlavaModForConditionalGeneration` or `LlavaForConditionalGeneration`):
            A dense LLaVA of this package or of transformers; left unchanged.
        layers (`str` or `list[int]`, *optional*, defaults to `"alternate"`):
            Which layers: `"alternate"` (0, 2, 4, …; the paper's), `"all"`, `"first_half"`, `"second_half"`, or indices.
        num_experts (`int`, *optional*, defaults to 4): experts per layer (paper, table 1).
        num_experts_per_tok (`int`, *optional*, defaults to 2): experts per token (paper, table 1); with 1 the router
            learns from its aux loss alone.
        expert_rank (`int`, *optional*):
            The experts share the dense FFN and differ from it by matrices of this rank; by default they are whole FFNs.
        use_residual (`bool`, *optional*, defaults to `False`): keep the dense FFN beside the experts.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01): the authors' scripts'.
        router_aux_loss_type (`str`, *optional*, defaults to `"switch"`): `"switch"` (the authors') or `"pooled"`.
        router_z_loss_coef (`float`, *optional*, defaults to 0.0): the authors have none.
        seed (`int`, *optional*, defaults to 0): of the new weights: routers, low-rank differences, residual weights.

    Returns:
        `LlavaModForConditionalGeneration`: a new model, on the same device and of the same dtype.

    Raises:
        ValueError: if the model is sparse already, `layers` selects nothing or an index out of range, there are fewer
            experts than `num_experts_per_tok`, `expert_rank` is below 1, or an FFN is one that experts cannot
            reproduce.
    """
    if getattr(model.config.get_text_config(), "moe_layers", []):
        raise ValueError(
            f"The model is sparse already, in layers {model.config.get_text_config().moe_layers}: upcycle a dense one."
        )
    config = sparse_config(
        model,
        moe_layers=moe_layer_indices(layers, model.config.get_text_config().num_hidden_layers),
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        expert_rank=expert_rank,
        use_residual=use_residual,
        router_aux_loss_coef=router_aux_loss_coef,
        router_aux_loss_type=router_aux_loss_type,
        router_z_loss_coef=router_z_loss_coef,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # with the input's attention, which a config does not store, and which Gemma 2 has another of than its tower
        parts = {"": model.config, "text_config": model.config.text_config, "vision_config": model.config.vision_config}
        attention = {name: part._attn_implementation for name, part in parts.items()}
        sparse = LlavaModForConditionalGeneration._from_config(config, attn_implementation=attention)

    weights = dict(model.state_dict())
    new_weights = sparse.state_dict()
    if "lm_head.bias" in new_weights.keys() - weights.keys():  # of Phi, which stock LLaVA leaves out
        weights["lm_head.bias"] = torch.zeros_like(new_weights["lm_head.bias"])
    for index in config.moe_layers:
        path = f"model.language_model.layers.{index}.mlp"
        weights |= _expert_weights(sparse.get_submodule(path), f"{path}.", weights)
        # what the dense FFN does not determine stays as it was drawn
        weights = {name: value for name, value in new_weights.items() if name.startswith(f"{path}.")} | weights
    sparse.load_state_dict(weights)
    sparse.generation_config = copy.deepcopy(model.generation_config)
    sparse.to(device=model.device, dtype=model.dtype)
    # `to` rounds the rotary frequencies too, which a model loaded in bfloat16 has in float32
    buffers = dict(model.named_buffers())
    for name, buffer in sparse.named_buffers():
        buffer.data = buffers[name].detach().clone()
    for index in config.moe_layers:
        path = f"model.language_model.layers.{index}.mlp"
        _check_block(sparse.get_submodule(path), model.get_submodule(path), path)
    return sparse.train(model.training)
