"""Router logits and losses, against sums written out here."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
)

from helpers.models import moe_blocks, sharpen
from llava_mod_hf.model.moe_llava_mod import router_losses


@torch.no_grad()
def test_router_logits_only_when_asked_for(sparse, batch):
    tokens = batch["input_ids"].numel()
    for model in (sparse, sparse.model):
        assert model(**batch).router_logits is None
        router_logits = model(**batch, output_router_logits=True).router_logits
        assert [tuple(logits.shape) for logits in router_logits] == [(tokens, 4), (tokens, 4)]
    sparse.config.output_router_logits = True
    try:
        assert len(sparse(**batch).router_logits) == 2
        assert sparse(**batch, output_router_logits=False).router_logits is None
    finally:
        sparse.config.output_router_logits = False


@torch.no_grad()
def test_router_logits_are_in_the_order_of_the_layers(sparse, batch):
    seen = []
    hooks = [
        block.gate.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        for block in moe_blocks(sparse)
    ]
    router_logits = sparse(**batch, output_router_logits=True).router_logits
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(given, expected) for given, expected in zip(router_logits, seen, strict=True))
    assert not torch.equal(*router_logits)


def switch_by_hand(router_logits, mask):
    """Experts times share of first choices times mean probability, token by token in float64, summed over layers."""
    total = 0.0
    for logits in router_logits:
        rows = logits.double()[mask.flatten().bool()]
        probabilities = rows.exp() / rows.exp().sum(-1, keepdim=True)
        for expert in range(rows.shape[1]):
            share = sum(1 for row in rows if row.argmax() == expert) / len(rows)
            total = total + rows.shape[1] * share * probabilities[:, expert].sum() / len(rows)
    return total


def pooled_by_hand(router_logits, mask, top_k):
    """As transformers: all choices count, and the layers are one big batch."""
    rows = torch.cat([logits.double()[mask.flatten().bool()] for logits in router_logits])
    probabilities = rows.exp() / rows.exp().sum(-1, keepdim=True)
    chosen = [set(row.argsort(descending=True)[:top_k].tolist()) for row in rows]
    shares = [sum(expert in choices for choices in chosen) / len(rows) for expert in range(rows.shape[1])]
    return rows.shape[1] * sum(share * probabilities[:, expert].mean() for expert, share in enumerate(shares))


def z_by_hand(router_logits, mask):
    rows = [logits.double()[mask.flatten().bool()] for logits in router_logits]
    return sum(sum(row.exp().sum().log() ** 2 for row in layer) / len(layer) for layer in rows)


@pytest.mark.parametrize("loss_type", ["switch", "pooled"])
def test_router_losses_against_sums_written_out(loss_type):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(12, 4, generator=generator, requires_grad=True) for _ in range(2)]
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]])
    config = LlamaConfig(num_experts=4, num_experts_per_tok=2, router_aux_loss_type=loss_type)
    by_hand = switch_by_hand(leaves, mask) if loss_type == "switch" else pooled_by_hand(leaves, mask, 2)
    for found, expected in zip(router_losses(leaves, config, mask), (by_hand, z_by_hand(leaves, mask)), strict=True):
        assert found.item() == pytest.approx(expected.item(), abs=1e-5)
        found_gradients = torch.autograd.grad(found, leaves, retain_graph=True)
        expected_gradients = torch.autograd.grad(expected, leaves, retain_graph=True)
        assert all(gradient.abs().max() > 1e-3 for gradient in expected_gradients)
        torch.testing.assert_close(found_gradients, expected_gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["mean", None])
def test_a_kind_that_nobody_knows_is_refused(loss_type):
    """The config refuses it when it is made, and not when it is changed."""
    config = LlamaConfig(num_experts=4, num_experts_per_tok=2, router_aux_loss_type=loss_type)
    with pytest.raises(ValueError, match=f"`router_aux_loss_type` is {loss_type!r}: give 'switch' or 'pooled'"):
        router_losses([torch.zeros(2, 4)], config)


@torch.no_grad()
@pytest.mark.parametrize("loss_type", ["switch", "pooled"])
def test_loss_and_router_losses(make_student, batch, loss_type):
    sparse = sharpen(make_student())
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    plain = sparse(**batch, labels=labels)
    expected = F.cross_entropy(plain.logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())
    assert plain.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert plain.aux_loss is None

    assert (sparse.config.router_aux_loss_type, sparse.config.router_z_loss_coef) == ("switch", 0.0)
    sparse.config.router_aux_loss_type, sparse.config.router_z_loss_coef = loss_type, 0.5
    outputs = sparse(**batch, labels=labels, output_router_logits=True)
    arguments = (outputs.router_logits, batch["attention_mask"])
    aux = switch_by_hand(*arguments) if loss_type == "switch" else pooled_by_hand(*arguments, 2)
    assert outputs.aux_loss.item() == pytest.approx(aux.item(), abs=1e-5)
    unmasked = torch.ones_like(batch["attention_mask"])
    arguments = (outputs.router_logits, unmasked)
    other = switch_by_hand(*arguments) if loss_type == "switch" else pooled_by_hand(*arguments, 2)
    assert abs(outputs.aux_loss.item() - other.item()) > 1e-3  # padding would have made a difference
    assert sparse.config.router_aux_loss_coef == 0.01
    z = z_by_hand(outputs.router_logits, batch["attention_mask"])
    assert outputs.loss.item() == pytest.approx(plain.loss.item() + 0.01 * aux.item() + 0.5 * z.item(), abs=1e-4)


@pytest.mark.parametrize("coef", [0.0, 0.5])
def test_gradients_reach_routers_and_experts(make_student, batch, coef):
    student = sharpen(make_student()).train()
    student.config.get_text_config().router_aux_loss_coef = coef
    student(**batch, labels=batch["input_ids"], output_router_logits=True).loss.backward()
    for block in moe_blocks(student):
        assert block.gate.weight.grad.abs().max() > 1e-6
        for parameter in block.experts.parameters():
            assert (parameter.grad.abs().amax(dim=(1, 2)) > 1e-6).all()  # each expert is some token's choice


def test_the_routers_gradient_holds_the_aux_loss(make_student, batch):
    gradients = []
    for coef in (0.0, 1.0):
        student = sharpen(make_student())
        student.config.get_text_config().router_aux_loss_coef = coef
        student(**batch, labels=batch["input_ids"], output_router_logits=True).loss.backward()
        gradients.append(moe_blocks(student)[0].gate.weight.grad)
    student.zero_grad()
    outputs = student(**batch, output_router_logits=True)
    switch_by_hand(outputs.router_logits, batch["attention_mask"]).backward()
    aux_gradient = moe_blocks(student)[0].gate.weight.grad
    assert aux_gradient.abs().max() > 1e-4
    torch.testing.assert_close(gradients[1] - gradients[0], aux_gradient, rtol=1e-3, atol=1e-5)
