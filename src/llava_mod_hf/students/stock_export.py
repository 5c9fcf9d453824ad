"""Stock models from a student, for runtimes without its code: its experts merged into dense FFNs, or kept exactly."""

import copy

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, LlavaConfig, LlavaForConditionalGeneration
from transformers.initialization import no_init_weights

from llava_mod_hf.model.configuration_llava_mod import MOE_DEFAULTS
from llava_mod_hf.model.modeling_llava_mod import logit_transform
from llava_mod_hf.students.router_bias import has_router_bias

MERGES = ("uniform", "load")

# Fields of a stock mixture of experts that say what the student's do: gates that sum to 1, no expert for every token.
QWEN_MOE = {"norm_topk_prob": True, "decoder_sparse_step": 1}


def empty_model(model_class, config, *, dtype=None, attn_implementation=None):
    """A model whose parameters are allocated but not set; buffers, which are computed from the config, are."""
    with no_init_weights():
        model = model_class._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    model.tie_weights()
    return model


def expert_weights(experts):
    """
    The weights of every expert as those of a dense FFN of its family.

    Args:
        experts (`LlavaModExperts` or `LlavaModLowRankExperts`): of a layer.

    Returns:
        `dict[str, torch.Tensor]`: by name in the FFN, such as `gate_proj.weight`, `(experts, *shape of the dense one)`.
    """
    first, second = experts.layout.first, experts.layout.second
    if hasattr(experts, "shared"):
        shared = {name: value for name, value in experts.shared.state_dict().items()}
        changes = {**dict(zip(first, (experts.up_b @ experts.up_a).chunk(len(first), dim=1), strict=True))}
        changes[second] = experts.down_b @ experts.down_a
        weights = {name: value.expand(experts.num_experts, *value.shape) for name, value in shared.items()}
        return weights | {f"{part}.weight": shared[f"{part}.weight"] + change for part, change in changes.items()}
    return {
        part: weight
        for packed, parts in experts.sources().items()
        for part, weight in zip(parts, getattr(experts, packed).chunk(len(parts), dim=1), strict=True)
    }


@torch.no_grad()
def merge_experts(model, *, weights="uniform", loads=None):
    """
    A dense stock LLaVA whose FFNs are averages of a student's experts, `W = Σ_e w_e W_e` with `Σ_e w_e = 1`.

    Exact while the experts are equal, as after upcycling, and an approximation after that: the router's choice for each
    token is lost, and an average of FFNs is not the FFN of an average. Measure before you use it.

    Args:
        model (`LlavaModForConditionalGeneration`): a sparse student; left unchanged.
        weights (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"`: 1/E each. `"load"`: each expert's share of the routers' choices.
        loads (`dict[int, list[float]]`, *optional*):
            With `"load"`, the shares by layer, as [`~llava_mod_hf.evaluation.router_use.loads_of`] has them.

    Returns:
        `LlavaForConditionalGeneration`: a new model, on the same device and of the same dtype.

    Raises:
        ValueError: if the model is dense, `loads` is missing, does not fit or is given in vain, a dense FFN is kept
            beside the experts, or stock LLaVA does not compute what the family does after the last layer.
    """
    layers = sparse_layers(model)
    if weights not in MERGES:
        raise ValueError(f"`weights` is {weights!r}: give one of {', '.join(MERGES)}.")
    if (loads is not None) != (weights == "load"):
        raise ValueError(f"`weights` is {weights!r} and `loads` is {loads!r}: the one needs the other.")
    if model.config.use_residual:
        raise ValueError(
            "The student keeps the dense FFN beside the experts (`use_residual`), in shares that differ by token: "
            "there is no average."
        )
    shares = check_loads(loads, model) if loads is not None else {}

    state = _without_ffns(model, layers)
    for index in layers:
        experts = model.model.language_model.layers[index].mlp.experts
        share = shares.get(index, torch.full((experts.num_experts,), 1 / experts.num_experts))
        for part, weight in expert_weights(experts).items():
            merged = torch.einsum("e,e...->...", share.to(weight.device, torch.float64), weight.double())
            state[f"model.language_model.layers.{index}.mlp.{part}"] = merged.to(weight.dtype)
    text_config = copy.deepcopy(model.config.text_config)
    for name in MOE_DEFAULTS:
        if hasattr(text_config, name):
            delattr(text_config, name)
    return _stock_llava(model, text_config, state)


@torch.no_grad()
def export_stock(model):
    """
    The same student as a stock LLaVA over a mixture of experts of transformers: it loads without remote code.

    | student | stock language model |
    |---|---|
    | Qwen3 | `qwen3_moe` |
    | Qwen2, Qwen1.5, Qwen2.5 | `qwen2_moe` with a shared expert of size 0 |
    | Llama or Mistral, experts in all layers | `mixtral` |
    | Llama or Mistral, experts in some layers | `qwen2_moe` without biases, with a shared expert of size 0 |

    The logits are equal in float32. In half precision the student runs its router in float32 and the stock models do
    not, so that a close choice of expert may differ.

    Args:
        model (`LlavaModForConditionalGeneration`): a sparse student; left unchanged.

    Returns:
        `LlavaForConditionalGeneration`: a new model, on the same device and of the same dtype.

    Raises:
        ValueError: if the model is dense, or has no exact counterpart.
    """
    layers = sparse_layers(model)
    text_config = _stock_moe_config(model, layers)
    state = _without_ffns(model, layers)
    width, like = text_config.hidden_size, model.lm_head.weight
    for index in layers:
        prefix = f"model.language_model.layers.{index}.mlp."
        block = model.model.language_model.layers[index].mlp
        parts = expert_weights(block.experts)
        gate_up = torch.cat([parts["gate_proj.weight"], parts["up_proj.weight"]], dim=1)
        state |= {f"{prefix}experts.gate_up_proj": gate_up, f"{prefix}experts.down_proj": parts["down_proj.weight"]}
        state[f"{prefix}gate.weight"] = block.gate.weight
        if text_config.model_type == "qwen2_moe":
            shapes = {"gate_proj": (0, width), "up_proj": (0, width), "down_proj": (width, 0)}
            state |= {f"{prefix}shared_expert.{part}.weight": like.new_zeros(shape) for part, shape in shapes.items()}
            state[f"{prefix}shared_expert_gate.weight"] = like.new_zeros(1, width)
    return _stock_llava(model, text_config, state)


def sparse_layers(model):
    """
    The layers with experts.

    Raises:
        ValueError: if there are none.
    """
    layers = getattr(model.config, "moe_layers", [])
    if not layers:
        raise ValueError(f"The {type(model).__name__} has no experts: it is dense already.")
    return layers


def check_loads(loads, model):
    """
    Loads by layer as `results.json` of `llava-mod evaluate` has them, or Python: `dict[int, torch.DoubleTensor]`.

    Raises:
        ValueError: if they are of other layers or another number of experts than the model's, or do not sum to 1.
    """
    layers, num_experts = model.config.moe_layers, model.config.num_experts
    loads = {int(layer): torch.tensor(share, dtype=torch.float64) for layer, share in loads.items()}
    fits = sorted(loads) == layers and all(
        len(share) == num_experts and share.min() >= 0 and abs(share.sum() - 1) < 1e-6 for share in loads.values()
    )
    if not fits:
        raise ValueError(
            f"`loads` is of the layers {sorted(loads)} with {sorted({len(share) for share in loads.values()})} shares: "
            f"give {num_experts} shares that sum to 1 for each of the layers {layers}."
        )
    return loads


def _without_ffns(model, layers):
    prefixes = tuple(f"model.language_model.layers.{index}.mlp." for index in layers)
    return {name: value for name, value in model.state_dict().items() if not name.startswith(prefixes)}


def _stock_moe_config(model, layers):
    """Config of the stock mixture of experts that computes what the student's language model does."""
    config, text, kind = model.config, model.config.text_config, model.config.text_config.model_type
    reasons = {
        "chooses experts by a bias of its routers (`router_bias_update`)": has_router_bias(model),
        "keeps the dense FFN beside its experts (`use_residual`)": config.use_residual,
        "has sliding attention": getattr(text, "use_sliding_window", False)
        or (kind in ("llama", "mistral") and getattr(text, "sliding_window", None)),
        "has biases in its attention or FFNs": getattr(text, "mlp_bias", False)
        or (kind == "llama" and text.attention_bias),
        "is of the family " + kind: kind not in ("qwen3", "qwen2", "llama", "mistral"),
    }
    for reason, found in reasons.items():
        if found:
            raise ValueError(
                f"The student {reason}, of which transformers has no mixture of experts that computes the same: keep "
                "its own code, or make it dense with `merge_experts`."
            )
    everywhere = len(layers) == text.num_hidden_layers
    target = {"qwen3": "qwen3_moe", "qwen2": "qwen2_moe"}.get(kind, "mixtral" if everywhere else "qwen2_moe")
    config_class = CONFIG_MAPPING[target]
    values = {name: getattr(text, name) for name in config_class.__annotations__ if hasattr(text, name)}
    values["head_dim"] = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if target == "mixtral":
        return config_class(**values | {"num_local_experts": text.num_experts})
    dense = [index for index in range(text.num_hidden_layers) if index not in layers]
    values |= QWEN_MOE | {"mlp_only_layers": dense, "moe_intermediate_size": text.intermediate_size}
    if target == "qwen2_moe":
        values |= {"shared_expert_intermediate_size": 0, "qkv_bias": kind == "qwen2"}
    return config_class(**values)


def _stock_llava(model, text_config, state):
    scale, cap = logit_transform(text_config)
    bias = state.pop("lm_head.bias", None)
    if scale != 1.0 or cap is not None or (bias is not None and bias.any()):
        raise ValueError(
            f"`{model.config.text_config.model_type}` scales, caps or shifts its logits after the head, which stock "
            "LLaVA leaves out: its answers would differ."
        )
    values = {
        name: value
        for name, value in model.config.to_dict().items()
        if name not in (*MOE_DEFAULTS, "model_type", "architectures", "auto_map", "text_config", "vision_config")
    }
    # vLLM's LLaVA finds its language model by this name
    text_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)].__name__]
    config = LlavaConfig(**values, text_config=text_config, vision_config=copy.deepcopy(model.config.vision_config))
    stock = empty_model(
        LlavaForConditionalGeneration,
        config,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
    )
    stock.load_state_dict(state)
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.to(model.device).train(model.training)
