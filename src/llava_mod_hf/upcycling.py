"""Sparse upcycling: a dense FFN becomes identical experts, so that the sparse student starts as the dense one."""

import copy

import torch

from llava_mod_hf.configuration_llava_mod import LlavaModConfig
from llava_mod_hf.modeling_llava_mod import LlavaModForConditionalGeneration

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


@torch.no_grad()
def upcycle(model, *, layers="alternate", num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.01, seed=0):
    """
    A sparse student whose experts are all copies of the dense FFN (Komatsuzaki et al., 2023; paper, section 3.1).

    The gates of a token sum to 1 and its experts are equal, so the logits are the dense model's.

    Args:
        model (`LlavaModForConditionalGeneration` or `LlavaForConditionalGeneration`):
            A dense LLaVA of this package or of transformers; left unchanged.
        layers (`str` or `list[int]`, *optional*, defaults to `"alternate"`):
            Which layers: `"alternate"` (0, 2, 4, …; the paper's), `"all"`, `"first_half"`, `"second_half"`, or indices.
        num_experts (`int`, *optional*, defaults to 4): experts per layer (paper, table 1).
        num_experts_per_tok (`int`, *optional*, defaults to 2): experts per token (paper, table 1).
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01): the authors' scripts'.
        seed (`int`, *optional*, defaults to 0): of the new routers, the only new weights.

    Returns:
        `LlavaModForConditionalGeneration`: a new model, on the same device and of the same dtype.

    Raises:
        ValueError: if the model is sparse already, `layers` selects nothing or an index out of range, there are fewer
            experts than `num_experts_per_tok`, or an FFN is not a gated one without biases.
    """
    if getattr(model.config.get_text_config(), "moe_layers", []):
        raise ValueError(
            f"The model is sparse already, in layers {model.config.get_text_config().moe_layers}: upcycle a dense one."
        )
    config_values = copy.deepcopy(model.config).to_dict()
    for name in ("model_type", "architectures", "auto_map"):
        config_values.pop(name, None)
    config = LlavaModConfig(
        **config_values,
        moe_layers=moe_layer_indices(layers, model.config.get_text_config().num_hidden_layers),
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        router_aux_loss_coef=router_aux_loss_coef,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # with the input's attention, which a config does not store
        sparse = LlavaModForConditionalGeneration._from_config(
            config, attn_implementation=model.config._attn_implementation
        )

    weights = dict(model.state_dict())
    for index in config.moe_layers:
        prefix = f"model.language_model.layers.{index}.mlp"
        gate, up, down = (weights.pop(f"{prefix}.{part}_proj.weight") for part in ("gate", "up", "down"))
        weights[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate, up]).expand(num_experts, -1, -1)
        weights[f"{prefix}.experts.down_proj"] = down.expand(num_experts, -1, -1)
        weights[f"{prefix}.gate.weight"] = sparse.get_parameter(f"{prefix}.gate.weight")
    sparse.load_state_dict(weights)
    sparse.generation_config = copy.deepcopy(model.generation_config)
    sparse.train(model.training)
    sparse.to(device=model.device, dtype=model.dtype)
    # `to` rounds the rotary frequencies too, which a model loaded in bfloat16 has in float32
    buffers = dict(model.named_buffers())
    for name, buffer in sparse.named_buffers():
        buffer.data = buffers[name].detach().clone()
    return sparse
