"""Students of `make_student` with other fields, and experts that make a difference."""

import torch

from helpers.models import sharpen
from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration


def different_experts(model):
    """Logits away from 0, and experts and routers that make a difference."""
    sharpen(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.config.moe_layers:
            block = model.model.language_model.layers[layer].mlp
            block.gate.weight.normal_()
            for parameter in block.experts.parameters():
                parameter.normal_(std=0.3)
    return model


def retyped(make_student, text_model_type, **fields):
    """A student like those of `make_student`, with other fields of its text config."""
    values = make_student(moe_layers=[0, 2], text_model_type=text_model_type).config.to_dict()
    moe = {
        name: fields.pop(name)
        for name in ("moe_layers", "use_residual", "expert_rank", "router_bias")
        if name in fields
    }
    values["text_config"] |= fields
    values["tie_word_embeddings"] = fields.get("tie_word_embeddings", True)  # the wrapper's decides
    values.pop("auto_map")
    return different_experts(LlavaModForConditionalGeneration(LlavaModConfig(**values | moe)).eval())
