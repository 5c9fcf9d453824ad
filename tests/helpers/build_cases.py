"""What the tests of `build` and their likes share."""

import torch
from transformers import (
    AutoModelForCausalLM,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from llava_mod_hf.loading import resolve

LANGUAGE_MODEL = "embedded:tiny-student-lm"


SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


VISION = {**SIZES, "intermediate_size": 64, "image_size": 64, "patch_size": 16}


TEXT = {**SIZES, "intermediate_size": 64, "vocab_size": 99, "max_position_embeddings": 16}


def clip_processor(size=64, resize=80):
    """As CLIP's: the shorter edge is resized, and the middle cropped out."""
    return CLIPImageProcessorPil(size={"shortest_edge": resize}, crop_size={"height": size, "width": size})


def siglip_processor(size=64):
    return SiglipImageProcessorPil(size={"height": size, "width": size})


def dino_processor(size):
    return BitImageProcessorPil(size={"shortest_edge": size + 10}, crop_size={"height": size, "width": size})


def llava():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=AutoModelForCausalLM.from_pretrained(resolve(LANGUAGE_MODEL)).config,
        vision_feature_layer=1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


# name → (model, image processor, hidden state that is read, first feature that is read, number of features)
ENCODERS = {
    "clip": (
        lambda: CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT)),
        clip_processor(),
        (-2, 1, 16),
    ),
    "clip-vision": (lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)), clip_processor(), (-2, 1, 16)),
    "siglip": (
        lambda: SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)),
        siglip_processor(),
        (-1, 0, 16),
    ),
    # trained at 70 pixels, and its processor crops at 56: so many patches there are
    "dinov2": (
        lambda: Dinov2Model(Dinov2Config(**SIZES, image_size=70, patch_size=14)),
        dino_processor(56),
        (-2, 1, 16),
    ),
    # 4 registers are read with the patches
    "dinov2-registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, image_size=70, patch_size=14)),
        dino_processor(70),
        (-2, 1, 29),
    ),
    # as that LLaVA reads it, CLS included
    "llava": (llava, clip_processor(), (1, 0, 17)),
}


def save(folder, model, image_processor):
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(index))
    model.save_pretrained(folder)
    if image_processor is not None:
        image_processor.save_pretrained(folder)
    return str(folder)
