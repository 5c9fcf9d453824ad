"""Parts that cannot become a student are refused by name."""

import copy
import json

import pytest
from huggingface_hub import constants
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertModel,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SwinConfig,
    SwinModel,
)

from helpers.build_cases import (
    LANGUAGE_MODEL,
    SIZES,
    VISION,
    clip_processor,
    save,
    siglip_processor,
)
from llava_mod_hf import build_student
from llava_mod_hf.students.vision_layout import vision_layout


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def refused(tmp_path, make, image_processor):
    return save(tmp_path / "refused", make(), image_processor)


@pytest.mark.parametrize(
    ("make", "image_processor", "sentence"),
    [
        (
            lambda: Siglip2VisionModel(Siglip2VisionConfig(**SIZES, intermediate_size=64, num_patches=16)),
            Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16),
            "The image processor of `.*`, Siglip2ImageProcessor.*, gives `pixel_values` of the shapes .* fixed res",
        ),
        (
            lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])),
            siglip_processor(),
            "The vision encoder ConvNextModel of `.*` gives features of shape|ConvNextModel of `.*` has the `patch_s",
        ),
        (
            lambda: SwinModel(SwinConfig(image_size=64, embed_dim=24, depths=[1, 1], num_heads=[2, 2], window_size=2)),
            siglip_processor(),
            r"SwinModel of `.*` gives features of shape \(2, 64, 48\) for 2 images of 256 patches: LLaVA needs",
        ),
        (
            lambda: BertModel(BertConfig(**SIZES, intermediate_size=64, vocab_size=99)),
            siglip_processor(),
            "The vision encoder BertModel of `.*` does not read the images of 64×64 pixels",
        ),
        (
            lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
            clip_processor(size=32),
            "CLIPVisionModel of `.*` does not read the images of 32×32 pixels that its image processor gives",
        ),
        (
            lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
            CLIPImageProcessorPil(size={"shortest_edge": 64}, do_center_crop=False),
            "CLIPImageProcessor.*, gives `pixel_values` of the shapes .* for a wide and a tall image",
        ),
        (
            lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
            None,
            "The vision tower `.*` has no image processor: save it beside the weights",
        ),
    ],
    ids=["naflex", "convnext", "swin", "text-model", "other-size", "keeps-shape", "no-processor"],
)
def test_encoders_that_are_refused(tmp_path, make, image_processor, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        build_student(refused(tmp_path, make, image_processor), LANGUAGE_MODEL)
    assert "\n" not in str(raised.value)


def test_naflex_is_named_from_its_config_alone():
    with pytest.raises(ValueError, match="The vision encoder Siglip2VisionModel of `siglip2_vision_model` does not"):
        vision_layout(Siglip2VisionConfig(**SIZES, intermediate_size=64, num_patches=16), (64, 64))


def test_square_patches():
    layout = vision_layout(CLIPVisionConfig(**VISION | {"patch_size": 16}), (64, 64))
    assert (layout.patch_size, layout.num_image_tokens, layout.num_additional_tokens) == (16, 16, 1)
    with pytest.raises(ValueError, match=r"Dinov2Model of `dinov2` (has the `patch_size`|does not read)"):
        vision_layout(Dinov2Config(**SIZES, image_size=64, patch_size=[16, 8]), (64, 64))


def test_incomplete_tower(encoders, tmp_path):
    model, _ = encoders["clip-vision"]
    folder = save(tmp_path / "tower", copy.deepcopy(model), clip_processor())
    model.save_pretrained(folder, state_dict={k: v for k, v in model.state_dict().items() if "layers.1" not in k})
    with pytest.raises(ValueError, match=r"lacks \d+ weights of CLIPVisionModel, among them `encoder.layers.1"):
        build_student(folder, LANGUAGE_MODEL)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (("nobody/none", LANGUAGE_MODEL), "The vision tower `nobody/none` could not be loaded: "),
        (("embedded:tiny-teacher", "nobody/none"), "The language model `nobody/none` could not be loaded: "),
        (("embedded:tiny-teacher", "embedded:tiny-teacher"), "could not be loaded: Unrecognized configuration class"),
        ((LANGUAGE_MODEL, LANGUAGE_MODEL), "The vision tower `embedded:tiny-student-lm` has no image processor"),
    ],
)
def test_bad_names(offline, parts, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        build_student(*parts)
    assert "\n" not in str(raised.value)


def test_language_model_without_tokenizer(encoders, language_model, tmp_path, offline):
    language_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The tokenizer of `.*` could not be loaded: "):
        build_student(encoders["clip"][1], str(tmp_path))


def test_tokenizer_of_another_model(encoders, language_model, lm_tokenizer):
    other = copy.deepcopy(lm_tokenizer)
    other.add_tokens([f"<{index}>" for index in range(40)])
    rows = language_model.get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match=rf"has {len(other)} tokens and its embeddings have {rows} rows"):
        build_student(encoders["clip"][1], language_model, tokenizer=other)


def test_processor_of_a_saved_student_is_whole(encoders, tmp_path):
    _, processor = build_student(encoders["dinov2-registers"][1], LANGUAGE_MODEL)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["num_additional_image_tokens"] == 5  # CLS and 4 registers
    assert AutoImageProcessor.from_pretrained(tmp_path).crop_size["height"] == 70
