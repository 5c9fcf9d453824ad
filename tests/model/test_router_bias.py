"""A bias of the routers moves the choice of experts alone; only students that have one have it in their file."""

import json

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from helpers.models import image_batch, moe_blocks, sharpen
from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration
from llava_mod_hf.model.moe_llava_mod import choose_experts
from llava_mod_hf.students.router_bias import add_router_bias, has_router_bias, router_biases

BIAS = "e_score_correction_bias"


@pytest.fixture
def student(make_student):
    return sharpen(make_student())


@pytest.fixture
def batch(processor):
    return image_batch(processor, ["is there a red circle?", "what color is it?"])


def biased(student, value=0.3):
    add_router_bias(student)
    for place, bias in enumerate(router_biases(student)):
        bias.copy_(torch.tensor([0.0, value, -value, value / 3]).roll(place))
    return student


def tokens_of(block, count=50):
    return torch.randn(count, block.gate.weight.shape[1], generator=torch.Generator().manual_seed(0))


def test_experts_are_chosen_with_the_bias_and_weighed_without_it(student):
    """Token by token, in float64."""
    block = moe_blocks(biased(student))[0]
    tokens, bias = tokens_of(block), router_biases(student)[0].double()
    with torch.no_grad():
        logits, weights, index = block.gate(tokens)
        moved = 0
        for token, found, chosen in zip(tokens.double(), weights, index.tolist(), strict=True):
            p = (block.gate.weight.double() @ token).softmax(0)
            expected = sorted(range(4), key=lambda expert, p=p: -(p + bias)[expert])[:2]
            moved += set(expected) != set(p.topk(2).indices.tolist())
            assert chosen == expected
            assert found.tolist() == pytest.approx((p[expected] / p[expected].sum()).tolist(), rel=1e-5)
    assert 5 < moved < 50
    torch.testing.assert_close(logits, F.linear(tokens, block.gate.weight))  # which the losses are computed of


def test_no_gradient_reaches_it_and_that_of_the_gates_does_not_know_it(student):
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights, index = choose_experts(logits, 2, torch.tensor([0.0, 0.5, 0.0, -0.5]))
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    again = logits.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(again.softmax(-1).gather(-1, index).sum(), again)
    assert torch.equal(gradient, expected)
    add_router_bias(student)
    assert not [name for name, _ in student.named_parameters() if name.endswith(BIAS)]
    assert not any(bias.requires_grad for bias in router_biases(student))


def test_a_bias_of_nothing_changes_no_bit(student, batch):
    with torch.no_grad():
        before = student(**batch).logits
        add_router_bias(student)
        assert torch.equal(student(**batch).logits, before)
        assert not has_router_bias(student)
        biased(student)
        assert has_router_bias(student)
        assert (student(**batch).logits - before).abs().max() > 1e-3


def test_it_is_saved_and_read_in_full_precision(student, batch, tmp_path):
    biased(student, 0.3001).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["router_bias"] is True
    for dtype in (torch.float32, torch.bfloat16):
        loaded, info = LlavaModForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert loaded.lm_head.weight.dtype == dtype
        for found, expected in zip(router_biases(loaded), router_biases(student), strict=True):
            assert found.dtype == torch.float32 and torch.equal(found, expected)
    with torch.no_grad():
        loaded = LlavaModForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(loaded(**batch).logits, student(**batch).logits)


def test_students_without_it_are_written_as_they_were(student, tmp_path):
    student.save_pretrained(tmp_path)
    assert "router_bias" not in (tmp_path / "config.json").read_text()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if BIAS in name]  # noqa: SIM118 (no mapping)
    loaded = LlavaModForConditionalGeneration.from_pretrained(tmp_path)
    assert router_biases(loaded) == [None, None] and loaded.config.router_bias is False


def test_a_new_student_of_the_config_has_biases_of_nothing(student):
    config = LlavaModConfig.from_dict({**student.config.to_dict(), "router_bias": True})
    made = LlavaModForConditionalGeneration(config)
    assert [bias.tolist() for bias in router_biases(made)] == [[0.0] * 4] * 2


def test_what_cannot_be_is_refused(make_student, student):
    with pytest.raises(ValueError, match="has no routers whose bias could be moved: leave out `router_bias_update`"):
        add_router_bias(make_student(moe_layers=[]))
    with pytest.raises(ValueError, match="`router_bias` is 1: give true or false"):
        LlavaModConfig.from_dict({**student.config.to_dict(), "router_bias": 1})
    for block in moe_blocks(student):
        del block.gate.e_score_correction_bias  # as in the code that came with a student of before
    with pytest.raises(ValueError, match="own LlavaModTopKRouter knows no bias"):
        add_router_bias(student)
