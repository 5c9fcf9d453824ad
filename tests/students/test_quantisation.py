"""Weights of 8 and 4 bits: what is quantised, by how much it is off, what it takes, and that it loads again."""

import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, Qwen2Config

from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration
from llava_mod_hf.evaluation.generating import evaluating
from llava_mod_hf.students.quantisation import bytes_in_memory, load_quantised, quantization_config

EXPERTS = "model.language_model.layers.0.mlp.experts"
EVERYTHING_ELSE = (
    "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
    "model.multi_modal_projector.linear_1.weight",
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.0.mlp.gate.weight",
    "model.language_model.norm.weight",
)


@pytest.fixture(scope="module")
def student():
    config = LlavaModConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        ),
        text_config=Qwen2Config(
            vocab_size=200,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        moe_layers=[0, 2],
    )
    student = LlavaModForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return student


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    student.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(student):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, student.config.text_config.vocab_size - 1, (2, 12), generator=generator)


@pytest.fixture(scope="module")
def int8(folder):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install -e '.[quantization]'")
    return load_quantised(folder, bits=8, dtype="float32")


@pytest.fixture(scope="module")
def nf4(folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[quantization]'")
    return load_quantised(folder, bits=4, dtype="float32")


@torch.no_grad()
def relative_error(model, student, tokens):
    expected = student(tokens).logits
    return ((model(tokens).logits - expected).norm() / expected.norm()).item()


def int8_by_hand(weight):
    """Each row in 255 steps from −max to max."""
    scale = weight.double().abs().amax(dim=-1, keepdim=True) / 127.5
    return scale * (weight.double() / scale).round().clamp(-128, 127)


def size_on_disk(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_int8_by_hand(int8, student):
    names = [f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj", "model.language_model.layers.1.mlp.up_proj.weight"]
    for name in [*names, "model.language_model.layers.1.self_attn.q_proj.weight"]:
        weight, packed = student.get_parameter(name).detach(), int8.get_parameter(name)
        assert packed.qdata.dtype == torch.int8
        assert packed.qdata.shape == packed.shape == weight.shape
        step = weight.abs().amax(dim=-1, keepdim=True) / 127
        assert ((packed.dequantize() - weight).abs() <= 0.51 * step).all()
        equal = torch.isclose(packed.dequantize().double(), int8_by_hand(weight), rtol=0, atol=1e-6)
        assert equal.double().mean() > 0.99  # a value half-way between two steps goes to either
    for name in EVERYTHING_ELSE:
        assert torch.equal(int8.get_parameter(name), student.get_parameter(name))


def test_int8_logits_and_sizes(int8, student, tokens, tmp_path, folder):
    # rounding to 1/127 of the largest of a row is about half a percent of a value
    assert 1e-4 < relative_error(int8, student, tokens) < 0.05
    quantised = [name for name, parameter in int8.named_parameters() if hasattr(parameter, "qdata")]
    saved = sum(student.get_parameter(name).numel() for name in quantised)
    scales = sum(int8.get_parameter(name).scale.numel() for name in quantised)
    assert bytes_in_memory(student) == 4 * student.num_parameters()
    # a row has its scale in float32 and its zero point in int8
    assert bytes_in_memory(int8) == bytes_in_memory(student) - 3 * saved + 5 * scales

    int8.save_pretrained(tmp_path)
    assert size_on_disk(tmp_path) < size_on_disk(folder) - 2.5 * saved
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, int8(tokens).logits)
    with evaluating(again):  # as answers are generated
        generated = again.generate(tokens[:, :4], attention_mask=torch.ones(2, 4), max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 7)


def test_4_bits(nf4, student, tokens):
    for name in ("gate_up_proj", "down_proj"):
        weight = student.get_parameter(f"{EXPERTS}.{name}").detach()
        packed = nf4.get_parameter(f"{EXPERTS}.parametrizations.{name}.original")
        assert (packed.dtype, packed.numel()) == (torch.uint8, weight.numel() // 2)  # two values a byte
        unpacked = getattr(nf4.get_submodule(EXPERTS), name)
        largest = weight.reshape(-1, 64).abs().amax(dim=-1, keepdim=True)
        # NF4's levels are at most 0.304 apart, as shares of the largest of a block of 64
        assert ((unpacked - weight).reshape(-1, 64).abs() <= 0.153 * largest).all()
        assert not torch.equal(unpacked, weight)
    for name in EVERYTHING_ELSE:
        assert torch.equal(nf4.get_parameter(name), student.get_parameter(name))
    quantised = sum(
        parameter.numel()
        for name, parameter in student.named_parameters()
        if "language_model.layers" in name and "_proj" in name and not name.endswith("bias")
    )
    scales_and_levels = bytes_in_memory(nf4) - (4 * (student.num_parameters() - quantised) + quantised // 2)
    assert 4 * quantised / 64 <= scales_and_levels <= 4 * quantised / 64 + 64 * 100
    assert 0.01 < relative_error(nf4, student, tokens) < 0.6


def test_4_bits_refuse_rows_that_are_no_whole_blocks(make_student, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[quantization]'")
    make_student().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="The experts' `gate_up_proj` has rows of 32 values: 4 bits need a multiple of"
    ):
        load_quantised(tmp_path, bits=4)


def test_bad_bits():
    with pytest.raises(ValueError, match=r"`bits` is 3: give 8 \(torchao\) or 4 \(bitsandbytes\)"):
        quantization_config(3)


@pytest.mark.parametrize(("bits", "library"), [(8, "torchao.quantization"), (4, "bitsandbytes")])
def test_without_the_library(monkeypatch, bits, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"Weights of {bits} bits need {library.split('.')[0]}: install it with `pip"):
        quantization_config(bits)
