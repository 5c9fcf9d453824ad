"""`build_student`: the encoders it reads and how, precision and memory, and what it refuses."""

import copy
import json

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SwinConfig,
    SwinModel,
)

from llava_mod_hf import build_student
from llava_mod_hf.commands import adapt
from llava_mod_hf.commands.arguments import StudentArguments
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.loading import resolve
from llava_mod_hf.students import build as build_module
from llava_mod_hf.students.vision_layout import vision_layout
from llava_mod_hf.training.adapt_config import AdaptConfig

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


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """`{name: (model, folder)}`."""
    folder, made = tmp_path_factory.mktemp("encoders"), {}
    with torch.random.fork_rng():
        for name, (make, image_processor, _) in ENCODERS.items():
            model = make().eval()
            made[name] = model, save(folder / name, model, image_processor)
    return made


@pytest.fixture(scope="module")
def language_model():
    return AutoModelForCausalLM.from_pretrained(resolve(LANGUAGE_MODEL)).eval()


@pytest.fixture(scope="module")
def lm_tokenizer():
    return AutoTokenizer.from_pretrained(resolve(LANGUAGE_MODEL))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def encoder_of(model):
    inner = model.model if hasattr(model, "lm_head") else model
    return getattr(inner, "vision_tower", getattr(inner, "vision_model", inner))


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_features_and_placeholders(encoders, name):
    model, folder = encoders[name]
    layer, first, count = ENCODERS[name][2]
    student, processor = build_student(folder, LANGUAGE_MODEL)
    image = Image.effect_mandelbrot((90, 70), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[image], text=[text], return_tensors="pt")

    placeholders = (inputs["input_ids"] == student.config.image_token_id).sum().item()
    assert placeholders == count == student.config.image_seq_length
    # the given encoder's own hidden states, through the adaptor written out
    hidden = encoder_of(model)(inputs["pixel_values"], output_hidden_states=True).hidden_states[layer][0, first:]
    adaptor = student.model.multi_modal_projector
    inner = torch.nn.functional.gelu(hidden.double() @ adaptor.linear_1.weight.double().T + adaptor.linear_1.bias)
    expected = inner @ adaptor.linear_2.weight.double().T + adaptor.linear_2.bias
    outputs = student(**inputs)
    assert expected.shape == (count, student.config.text_config.hidden_size)
    torch.testing.assert_close(outputs.image_hidden_states.double(), expected, rtol=1e-4, atol=1e-5)
    assert outputs.logits.isfinite().all()


@torch.no_grad()
def test_text_goes_through_the_given_language_model(encoders, language_model, lm_tokenizer):
    student, _ = build_student(encoders["siglip"][1], LANGUAGE_MODEL)
    tokens = lm_tokenizer("what color is it?", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(student(tokens).logits, language_model(tokens).logits, rtol=0, atol=1e-5)


def test_chosen_feature_layer(encoders):
    student, _ = build_student(encoders["clip"][1], LANGUAGE_MODEL, vision_feature_layer=1)
    assert student.config.vision_feature_layer == 1
    student, _ = build_student(encoders["clip"][1], LANGUAGE_MODEL, vision_feature_layer=[-2, -1])
    assert student.model.multi_modal_projector.linear_1.in_features == 2 * 32
    with pytest.raises(ValueError, match="`vision_feature_layer` is -5, .*CLIPVisionModel.* 4 hidden states: give one"):
        build_student(encoders["clip"][1], LANGUAGE_MODEL, vision_feature_layer=-5)


# Precision, memory and what is left alone


def test_dtype(encoders):
    student, _ = build_student(encoders["clip"][1], LANGUAGE_MODEL, dtype="bfloat16")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.config.dtype == torch.bfloat16
    # the frequencies of the rotary embedding are not to be rounded
    assert student.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any(tensor.is_meta for tensor in (*student.parameters(), *student.buffers()))
    with pytest.raises(ValueError, match="`dtype` is 'bf16': give a floating-point type of torch"):
        build_student(encoders["clip"][1], LANGUAGE_MODEL, dtype="bf16")


def test_dtype_of_a_recipe(monkeypatch, tmp_path):
    class Built(Exception):
        pass

    def build(*names, dtype, **kwargs):
        raise Built(dtype)

    monkeypatch.setattr(adapt, "build_student", build)
    student_args = StudentArguments("embedded:tiny-teacher", LANGUAGE_MODEL, student_dtype="bfloat16")
    data_args = DataArguments(dataset_name="embedded:easy-vqa", dataset_config="captions", max_samples=2)
    with pytest.raises(Built, match="bfloat16"):
        adapt.run(data_args, student_args, AdaptConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


def test_no_weight_is_copied(encoders, monkeypatch):
    loaded = {}
    for name in ("load_tower", "_load_language_model"):
        load = getattr(build_module, name)

        def keep(*args, load=load, name=name):
            loaded[name] = load(*args)
            return loaded[name]

        monkeypatch.setattr(build_module, name, keep)
    student, _ = build_student(encoders["clip"][1], LANGUAGE_MODEL)
    given = {p.data_ptr() for p in loaded["load_tower"].parameters()}
    given |= {p.data_ptr() for p in loaded["_load_language_model"][0].parameters()}
    new = {name for name, p in student.named_parameters() if p.data_ptr() not in given}
    assert {name.rsplit(".", 2)[0] for name in new} == {"model.multi_modal_projector"}


def test_given_language_model_and_tokenizer_stay_as_they_are(encoders, language_model, lm_tokenizer, tokenizer):
    without_image = copy.deepcopy(lm_tokenizer)
    rows = language_model.get_input_embeddings().num_embeddings
    before = {name: value.clone() for name, value in language_model.state_dict().items()}
    template = lm_tokenizer.chat_template
    student, processor = build_student(
        encoders["clip"][1], language_model, tokenizer=without_image, chat_template=template + "{# another #}"
    )
    assert processor.tokenizer.chat_template != without_image.chat_template == template
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert language_model.get_input_embeddings().num_embeddings == rows
    assert all(torch.equal(value, before[name]) for name, value in language_model.state_dict().items())
    with pytest.raises(ValueError, match="The LlamaForCausalLM was given without a tokenizer"):
        build_student(encoders["clip"][1], language_model)


@pytest.fixture(scope="module")
def lm_without_image_token(tmp_path_factory, language_model, lm_tokenizer):
    """A folder whose tokenizer has no `<image>`, and whose embeddings have no row to spare."""
    folder = tmp_path_factory.mktemp("text-lm")
    language_model.save_pretrained(folder)
    lm_tokenizer.save_pretrained(folder)
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace("<image>", "<spare>"))
    for path in folder.glob("*.jinja"):
        path.write_text(path.read_text().replace("<image>", "<spare>"))
    return str(folder)


def test_image_token_is_added(encoders, lm_without_image_token, language_model, lm_tokenizer):
    template = lm_tokenizer.chat_template

    def build(seed):
        return build_student(encoders["clip"][1], lm_without_image_token, chat_template=template, seed=seed)

    rows = language_model.get_input_embeddings().num_embeddings
    (student, processor), (same, _), (other, _) = build(0), build(0), build(1)
    assert student.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>") == rows
    assert student.config.text_config.vocab_size == rows + 1 == student.lm_head.out_features
    for name in ("model.language_model.embed_tokens.weight", "model.multi_modal_projector.linear_1.weight"):
        values = student.get_parameter(name)
        assert torch.equal(values, same.get_parameter(name))
        assert not torch.equal(values, other.get_parameter(name))
    trained = language_model.get_input_embeddings().weight
    assert torch.equal(student.model.language_model.embed_tokens.weight[:rows], trained)
    with pytest.raises(ValueError, match="does not write one `<image>`"):
        build_student(encoders["clip"][1], lm_without_image_token)


def test_the_global_generator_is_not_touched(encoders):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_student(encoders["clip"][1], LANGUAGE_MODEL)
    assert torch.equal(torch.rand(3), expected)


def test_no_folder_of_the_machine_is_saved(encoders, tmp_path):
    student, processor = build_student(encoders["clip"][1], LANGUAGE_MODEL)
    student.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for path in (*tmp_path.glob("*.json"), *tmp_path.glob("*.jinja")):
        assert str(encoders["clip"][1]) not in path.read_text()
        assert resolve(LANGUAGE_MODEL) not in path.read_text()


# What is refused


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
