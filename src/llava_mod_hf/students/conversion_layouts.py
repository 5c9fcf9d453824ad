"""What checkpoints of LLaVA-1.5, MoE-LLaVA and LLaVA-MoD look like: fields of their configs, names of weights."""

import logging
import re
from dataclasses import dataclass, field

from transformers import CONFIG_MAPPING

logger = logging.getLogger(__name__)

# What ends an answer, by the repositories' `conv_templates`, all of one style (`SeparatorStyle.TWO`).
CONVERSATIONS = {
    "qwen": "<|endoftext|>",
    "phi": "<|endoftext|>",
    "stablelm": "<|endoftext|>",
    "v1": "</s>",
    "mistral": "</s>",
    "openchat": "<|end_of_turn|>",
}


@dataclass(frozen=True)
class Family:
    """
    How a language model of those repositories is called here.

    Args:
        text_model_type (`str`): of transformers.
        conversation (`str`): of [`CONVERSATIONS`], the one that the repositories train it with.
        renamed (`dict`): fields of the config, there → here.
        absent (`tuple[str]`): weights that the stock model has and this layout has not; zero is exact.
    """

    text_model_type: str
    conversation: str
    renamed: dict = field(default_factory=dict)
    absent: tuple = ()


FAMILIES = {
    "qwen2": Family("qwen2", "qwen"),
    "qwen1_5": Family("qwen2", "qwen"),
    "llama": Family("llama", "v1"),
    "mistral": Family("mistral", "mistral"),
    "stablelm": Family("stablelm", "stablelm", {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}),
    # the repositories' `LlavaPhiForCausalLM` has a head without a bias, unlike the Phi of transformers
    "phi": Family("phi", "phi", absent=("lm_head.bias",)),
}

REFUSED_FAMILIES = {
    "qwen": "its Qwen is the first one (`w1`, `w2`, `c_proj`), which transformers does not have",
    "minicpm": "its MiniCPM scales embeddings, residuals and logits, and the embeddings of prompts with an image not",
    "gemma2": "its Gemma 2 scales image features with the embeddings, which the stock model does not do",
    "mpt": "its MPT has no FFN with a gate and no rotary positions",
}

# Of transformers' own, or without an effect on what is computed.
OTHER_FIELDS = re.compile(
    r"_.*|architectures|auto_map|model_type|transformers_version|(torch_)?dtype|use_cache|pretraining_tp|is_.*"
    r"|moe|lora|(un)?freeze_.*|tune_.*|use_mm_proj|(mm|image|video|tokenizer)_.*|max_sequence_length|return_dict"
    r"|output_.*|add_cross_attention|tie_encoder_decoder|chunk_size_feed_forward|gradient_checkpointing"
    r"|keys_to_ignore_at_inference|max_length|do_sample|temperature|top_[kp]|repetition_penalty"
)

PROJECTOR = {
    f"model.mm_projector.{module}{source}.": f"model.multi_modal_projector.linear_{target}."
    for module in ("", "image_spatial_proj.")
    for source, target in ((0, 1), (2, 2))
}

VISION_TOWER = re.compile(r"model\.(image_tower\.image_tower|vision_tower\.vision_tower)\.(vision_model\.)?")

SPARSE_FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(deepspeed_moe|mlp|coefficient)\.(.+)")

EXPERT = re.compile(r"experts\.deepspeed_experts\.(\d+)\.(.+)")

# Computed from the config; older versions of transformers stored them.
BUFFERS = re.compile(r".*(rotary_emb\.(inv_freq|cos_cached|sin_cached)|embeddings\.position_ids|masked_bias)")


@dataclass(frozen=True)
class Layout:
    """
    What a config of those repositories says.

    Args:
        family ([`Family`]): of the language model.
        text_config (`dict`): fields of its config, with the mixture-of-experts fields of a sparse student.
        vision_tower (`str`): Hub name or folder of the vision encoder.
        feature_layer (`int`): of its layers, the one whose output is used.
        select_strategy (`str`): `"default"` without the first token, `"full"` with it.
        pad_to_square (`bool`): whether images are padded to a square before they are resized.
    """

    family: Family
    text_config: dict
    vision_tower: str
    feature_layer: int
    select_strategy: str
    pad_to_square: bool


def read_layout(values, name):
    """
    Reads a config of those repositories; see [`Layout`].

    Args:
        values (`dict`): `config.json`.
        name (`str`): of the checkpoint, for errors.

    Raises:
        ValueError: if the language model is not one of [`FAMILIES`], or a field asks for what the student cannot do.
    """
    model_type = values.get("model_type", "")
    # LLaVA-1.5's first checkpoints say `llava`
    kind = "llama" if model_type == "llava" else re.sub("^(moe_)?llava_", "", model_type)
    if kind in REFUSED_FAMILIES:
        raise ValueError(f"`{name}` cannot be converted: {REFUSED_FAMILIES[kind]}.")
    if kind not in FAMILIES or kind == model_type:
        raise ValueError(
            f"`{name}` has `model_type` {model_type!r}: give a stock LLaVA, or `llava_X` or `moe_llava_X` with X one "
            f"of {', '.join(FAMILIES)}."
        )
    family = FAMILIES[kind]
    _refuse_fields(values, name)
    given = {family.renamed.get(key, key): value for key, value in values.items()}
    known = {*CONFIG_MAPPING[family.text_model_type].__annotations__}
    known |= {"rope_theta", "rope_scaling", "partial_rotary_factor"}
    text_config = {key: value for key, value in given.items() if key in known}
    unknown = sorted(key for key in given if key not in known and not OTHER_FIELDS.fullmatch(key))
    if unknown:
        logger.warning("Fields of the config of `%s` that nothing here reads: %s.", name, ", ".join(unknown))
    moe = values.get("moe") or {}
    if model_type.startswith("moe_") and moe.get("moe_enable", True):
        text_config |= _moe_fields(moe, name)
    return Layout(
        family=family,
        text_config=text_config,
        vision_tower=values.get("mm_image_tower") or values["mm_vision_tower"],
        feature_layer=values.get("mm_vision_select_layer", -2),
        select_strategy="full" if values.get("mm_vision_select_feature") == "cls_patch" else "default",
        pad_to_square=values.get("image_aspect_ratio") == "pad",
    )


def _refuse_fields(values, name):
    """Fields that change what is computed and have no counterpart."""
    projector = values.get("image_projector_type", values.get("mm_projector_type", "linear"))
    tower = values.get("mm_image_tower") or values.get("mm_vision_tower")
    feature = values.get("mm_vision_select_feature", "patch")
    aspect_ratio, merge = values.get("image_aspect_ratio"), values.get("mm_patch_merge_type")
    reasons = [
        (not tower, "names no vision encoder (`mm_image_tower` or `mm_vision_tower`)"),
        (values.get("mm_video_tower"), "has a video encoder (`mm_video_tower`)"),
        (values.get("s2"), "reads images at several scales (`s2`)"),
        (projector != "mlp2x_gelu", f"has an adaptor of type {projector!r}, not 'mlp2x_gelu'"),
        (values.get("mm_use_im_start_end"), "writes tokens around images (`mm_use_im_start_end`)"),
        (aspect_ratio not in (None, "square", "pad"), f"has `image_aspect_ratio` {aspect_ratio!r}, not 'pad' or none"),
        (merge not in (None, "flat"), f"has `mm_patch_merge_type` {merge!r}, not 'flat'"),
        (feature not in ("patch", "cls_patch"), f"selects the vision features {feature!r}, not 'patch' or 'cls_patch'"),
        ((values.get("lora") or {}).get("lora_enable"), "holds LoRA weights that were not merged (`lora`)"),
        (values.get("quantization_config"), "is quantised (`quantization_config`)"),
    ]
    for found, reason in reasons:
        if found:
            raise ValueError(f"`{name}` cannot be converted: it {reason}.")


def _moe_fields(moe, name):
    layers, num_experts, top_k = moe.get("moe_layers_idx"), moe.get("num_experts"), moe.get("top_k_experts", 2)
    if not layers or not num_experts:
        raise ValueError(f"`{name}` is sparse, but `moe` in its config has no `moe_layers_idx` or no `num_experts`.")
    num_experts = num_experts if isinstance(num_experts, list) else [num_experts]
    if len(set(num_experts)) > 1:
        raise ValueError(f"`{name}` has {num_experts} experts by layer: the student has one number for all layers.")
    if top_k == 1:
        raise ValueError(
            f"`{name}` sends each token to one expert, weighted with the router's probability: the student's gates sum "
            "to 1."
        )
    logger.warning(
        "`%s` limits what an expert takes (`eval_capacity_factor` %s) and drops the rest; the student drops nothing.",
        name,
        moe.get("eval_capacity_factor"),
    )
    fields = {
        "moe_layers": layers,
        "num_experts": num_experts[0],
        "num_experts_per_tok": top_k,
        "router_aux_loss_coef": moe.get("router_aux_loss_coef", 0.01),
    }
    if moe.get("use_residual"):
        fields["use_residual"] = True
    return fields


def target_of(source):
    """
    Where a weight of those repositories goes.

    Returns:
        `tuple[str, int | None, str]`: the parameter here; of a packed one, the prefix, the expert, and which part.
    """
    if match := VISION_TOWER.match(source):
        return "model.vision_tower." + source[match.end() :], None, ""
    for prefix, target in PROJECTOR.items():
        if source.startswith(prefix):
            return target + source.removeprefix(prefix), None, ""
    if match := SPARSE_FFN.fullmatch(source):
        layer, module, rest = match.groups()
        block = f"model.language_model.layers.{layer}.mlp."
        if module == "deepspeed_moe":
            if expert := EXPERT.fullmatch(rest):
                return f"{block}experts.", int(expert[1]), expert[2]
            return block + rest.replace("gate.wg.", "gate."), None, ""
        return f"{block}{'residual_mlp' if module == 'mlp' else module}.{rest}", None, ""
    return re.sub(r"^model\.", "model.language_model.", source), None, ""


def plan(source, target, packed, *, absent=()):
    """
    Finds a place for every weight of a checkpoint, and a weight for every place.

    Args:
        source (`dict[str, tuple]`): shapes in the checkpoint.
        target (`dict[str, tuple]`): shapes of the parameters here.
        packed (`dict[str, list[str]]`):
            Parameters here that hold all experts of a layer, `(E, rows, …)`, and what of an expert fills the rows.
        absent (`tuple[str]`, *optional*): parameters here that may stay without a weight.

    Returns:
        `dict[str, tuple[str, tuple]]`: by name in the checkpoint, the parameter and the index of what is filled.

    Raises:
        ValueError: naming every weight without a place, every place without a weight, and every other shape.
    """
    places = {}  # as `target_of` says → (parameter, index, shape)
    for name, shape in target.items():
        if name not in packed:
            places[name, None, ""] = name, (), tuple(shape)
            continue
        rows = shape[1] // len(packed[name])
        for position, part in enumerate(packed[name]):
            for expert in range(shape[0]):
                index = (expert, slice(position * rows, (position + 1) * rows))
                places[f"{name.rpartition('.')[0]}.", expert, part] = name, index, (rows, *shape[2:])

    slots, unknown, mismatched, filled = {}, [], [], set(absent)
    for name, shape in source.items():
        if BUFFERS.fullmatch(name):
            continue
        place = target_of(name)
        filled.add(_place_name(*place))
        parameter, index, expected = places.get(place, (None, (), None))
        if parameter is None:
            unknown.append(name)
        elif tuple(shape) != expected:
            mismatched.append(f"{name} {tuple(shape)} instead of {expected}")
        else:
            slots[name] = (parameter, index)
    missing = [name for name in (_place_name(*place) for place in places) if name not in filled]
    found = {"there is no place for": unknown, "it lacks": missing, "other shapes than the config's have": mismatched}
    if any(found.values()):
        parts = "; ".join(f"{what} {_listed(names)}" for what, names in found.items() if names)
        raise ValueError(f"The checkpoint does not fit its config: {parts}.")
    return slots


def _place_name(name, expert, part):
    return name if expert is None else f"{name}{expert}.{part}"


def _listed(names, most=8):
    return ", ".join(sorted(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
