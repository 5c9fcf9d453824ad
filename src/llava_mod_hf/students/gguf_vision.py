"""A student's encoder and adaptor as the GGUF file that llama.cpp calls mmproj."""

import torch
from PIL import Image
from transformers.utils import logging

logger = logging.get_logger(__name__)

KINDS = ("clip_vision_model", "siglip_vision_model")

# Activation of the encoder → what the file says; GELU is computed by its tanh form, in the adaptor as well.
ACTIVATIONS = {"quick_gelu": False, "gelu_pytorch_tanh": True, "gelu": True}

# Where the two encoders of transformers keep what llama.cpp names so.
NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm": "v.pre_ln",
    "post_layernorm": "v.post_ln",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def check_vision(model, processor):
    """
    Raises:
        ValueError: if llama.cpp's graph for LLaVA would compute other features than the student's encoder and adaptor.
    """
    config, vision = model.config, model.config.vision_config
    images = processor.image_processor
    sides = {images.size.get(name, vision.image_size) for name in ("height", "width", "shortest_edge")}
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    clip = vision.model_type == "clip_vision_model"
    reasons = {
        f"has the encoder {vision.model_type}": vision.model_type not in KINDS,
        f"reads several layers of its encoder, {layer}": not isinstance(layer, int),
        f"reads the features `{strategy}`": strategy != ("default" if clip else "full"),
        f"has the activation {vision.hidden_act} in its encoder": vision.hidden_act not in ACTIVATIONS,
        f"has the activation {config.projector_hidden_act} in its adaptor": config.projector_hidden_act != "gelu",
        "has an adaptor without biases": not config.multimodal_projector_bias,
        "has an encoder as wide as its FFNs": vision.intermediate_size == vision.hidden_size,  # taken for an old file
        f"has {vision.num_channels} channels": vision.num_channels != 3,
        f"resizes pictures to {sorted(sides)} for an encoder of {vision.image_size}": sides != {vision.image_size},
        "resizes pictures by another filter than the bicubic one": images.resample != Image.Resampling.BICUBIC,
    }
    for reason, found in reasons.items():
        if found:
            raise ValueError(
                f"The student {reason}, which llama.cpp's graph for LLaVA does not compute: it takes CLIP or SigLIP, "
                "one layer of it, all patches and no other token, and an adaptor with GELU and biases."
            )
    if clip:
        logger.warning(
            "llama.cpp puts CLIP's class token behind the patches, up to release 0.5.0 at least: there the student's "
            "answers to pictures are worse than its own; see https://github.com/ggml-org/llama.cpp/pull/25844."
        )


def add_vision(file, model, processor):
    """
    Writes encoder and adaptor, as far as the layer that is read.

    Args:
        file (`_Writer`): of the architecture `clip`, with a `writer` of the package gguf and `add(name, tensor)`.
        model (`PreTrainedModel`): that [`check_vision`] has passed.
        processor (`ProcessorMixin`).
    """
    writer, vision, images = file.writer, model.config.vision_config, processor.image_processor
    layers, normed = layers_read(model)
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_projection_dim(model.config.text_config.hidden_size)
    writer.add_vision_image_mean(images.image_mean)
    writer.add_vision_image_std(images.image_std)
    writer.add_array("clip.vision.feature_layer", [layers])
    if ACTIVATIONS[vision.hidden_act]:
        writer.add_vision_use_gelu(True)
    for name, tensor in model.model.vision_tower.state_dict().items():
        found = _gguf_name(name.removeprefix("vision_model."), layers, normed)
        if found is not None:
            file.add(found, tensor)
    for index, linear in (("0", "linear_1"), ("2", "linear_2")):
        for name, tensor in model.model.multi_modal_projector.get_submodule(linear).state_dict().items():
            file.add(f"mm.{index}.{name}", tensor)


def _gguf_name(name, layers, normed):
    """Its name there; nothing of what is behind the layer that is read."""
    if name in NAMES:
        return NAMES[name]
    part, _, kind = name.rpartition(".")
    if part.startswith("encoder.layers."):
        index, part = part.removeprefix("encoder.layers.").split(".", 1)
        return f"v.blk.{index}.{NAMES[part]}.{kind}" if int(index) < layers else None
    if part in NAMES and (part != "post_layernorm" or normed):
        return f"{NAMES[part]}.{kind}"
    return None


def layers_read(model):
    """
    How many layers of the encoder an image goes through, and whether the norm behind the last one is applied.

    Returns:
        `tuple[int, bool]`.
    """
    tower, vision = model.model.vision_tower, model.config.vision_config
    count, layer = vision.num_hidden_layers, model.config.vision_feature_layer
    layers = layer if layer >= 0 else count + 1 + layer
    if layers < count:
        return layers, False
    # which of the two hidden states transformers gives as the last one differs by encoder and by release
    raw = []
    stack = getattr(tower, "vision_model", tower).encoder.layers
    hook = stack[-1].register_forward_hook(lambda module, inputs, output: raw.append(output))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
    try:
        read = tower(pixels.to(model.device, tower.dtype), output_hidden_states=True).hidden_states[layer]
    finally:
        hook.remove()
    last = raw[0][0] if isinstance(raw[0], tuple) else raw[0]
    return layers, not torch.equal(read, last)
