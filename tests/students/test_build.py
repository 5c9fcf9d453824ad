"""`build_student`: the encoders it reads and how, precision and memory, and what it refuses."""

import copy

import pytest
import torch
from PIL import Image

from helpers.build_cases import (
    ENCODERS,
    LANGUAGE_MODEL,
)
from llava_mod_hf import build_student
from llava_mod_hf.commands import adapt
from llava_mod_hf.commands.arguments import StudentArguments
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.loading import resolve
from llava_mod_hf.students import build as build_module
from llava_mod_hf.training.adapt_config import AdaptConfig


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
