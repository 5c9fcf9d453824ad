"""A sparse student under `torch.compile`: a forward pass, and a decoded token as one graph."""

import pytest
import torch
from transformers import StaticCache

from helpers.models import assert_same_logits, image_inputs, make_dense
from llava_mod_hf import upcycle

pytestmark = pytest.mark.slow


@torch.no_grad()
def changed(student):
    """Its experts differ, as after a training."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in student.named_parameters():
        if ".mlp." in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return student


@pytest.fixture(scope="module")
def student():
    return changed(upcycle(make_dense("qwen2"), layers="all"))


@torch.no_grad()
def test_a_compiled_forward_gives_the_same(student):
    inputs = image_inputs(rows=2)
    assert_same_logits(torch.compile(student)(**inputs).logits, student(**inputs).logits)


def decoded(student):
    """The logits of a second token, as it is and compiled."""
    found = []
    for compiled in (False, True):
        cache = StaticCache(config=student.config.get_text_config(), max_cache_len=64)
        outputs = student(**image_inputs(rows=2), past_key_values=cache, use_cache=True)
        token = outputs.logits[:, -1:].argmax(-1)
        torch.compiler.reset()
        step = torch.compile(student.forward, backend="eager", fullgraph=True) if compiled else student.forward
        found.append(step(input_ids=token, past_key_values=cache, use_cache=True).logits)
    return found


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_a_decoded_token_is_one_graph(student, implementation):
    before = student.config.get_text_config()._experts_implementation
    student.set_experts_implementation(implementation)
    try:
        assert_same_logits(*decoded(student))
    finally:
        student.set_experts_implementation(before)


@torch.no_grad()
def test_a_decoded_token_is_one_graph_with_experts_of_low_rank():
    assert_same_logits(*decoded(changed(upcycle(make_dense("qwen2"), layers="all", expert_rank=3))))
