"""The chunked mimic loss in half precision, under a loss scale, against float64."""

import pytest
import torch

from helpers.oracles import mimic_sums
from llava_mod_hf.losses.chunked_mimic import chunked_mimic_loss
from llava_mod_hf.losses.divergences import DIVERGENCES
from llava_mod_hf.losses.rows import Head, ProjectedRows

LOSS_SCALE = 65536.0  # where GradScaler starts


def large(dtype, *, rows, vocabulary=32_000, width=16, close=False):
    """Hidden states and heads of `dtype`; `close` makes the student's logits some per cent of the teacher's."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, other = (
        (scale * torch.randn(size, width, generator=generator)).to(dtype)
        for scale, size in ((1.0, rows), (0.1, vocabulary), (0.1, vocabulary))
    )
    if close:
        return hidden, weight, hidden, (weight + 0.03 * other).to(dtype)
    return hidden, weight, hidden.flip(0), other


def scaled_gradients(hidden, weight, teacher_hidden, teacher_weight, *, items, autocast=False, **options):
    """The loss, and the gradients as an optimiser gets them: of the loss times `LOSS_SCALE`, divided by it."""
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    teachers = [ProjectedRows(teacher_hidden, Head(teacher_weight))]
    targets = torch.zeros(len(hidden), dtype=torch.long)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        terms = chunked_mimic_loss(leaves[0], Head(leaves[1]), targets, teachers, num_items=items, **options)
    (LOSS_SCALE * terms.loss).backward()
    return terms.loss.item(), [leaf.grad.double() / LOSS_SCALE for leaf in leaves]


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("divergence", "rows"),
    [
        *[(name, 32) for name in DIVERGENCES],
        *[pytest.param(name, 1024, marks=pytest.mark.slow) for name in DIVERGENCES],
        pytest.param("forward_kl", 8192, marks=pytest.mark.slow),
    ],
)
def test_fp16_keeps_its_gradients_under_a_loss_scale(divergence, rows):
    """Divided by the tokens of the step, most of a row's 32,000 gradients would be 0 before they are scaled."""
    tensors, items = large(torch.float16, rows=rows), max(rows, 1024)
    total, *expected = mimic_sums(divergence, *tensors, beta=0.3)
    loss, found = scaled_gradients(*tensors, items=items, divergence=divergence, jsd_beta=0.3)
    assert loss == pytest.approx(total / items, rel=1e-3)
    for gradient, sums in zip(found, expected, strict=True):
        assert relative_error(gradient, sums / items) < 3e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fp16_keeps_the_small_gradients_of_a_student_that_is_near_its_teacher(dtype):
    """Of weights in fp16, as DeepSpeed has them, and under autocast, as GradScaler has them."""
    tensors = large(torch.float16, rows=32, close=True)
    _, *expected = mimic_sums("forward_kl", *tensors)
    tensors = [tensor.to(dtype) for tensor in tensors]
    _, found = scaled_gradients(*tensors, items=1024, autocast=dtype == torch.float32)
    for gradient, sums in zip(found, expected, strict=True):
        assert relative_error(gradient, sums / 1024) < 0.1  # of the logits, which fp16 rounds


def test_fp16_sums_of_many_rows_stay_in_its_range():
    """A sum of 256 rows, whose gradients are 1 and hidden states 400, is beyond what fp16 holds; their mean is not."""
    hidden, weight = torch.full((256, 1), 400.0).half(), torch.tensor([[0.0], [-0.1]]).half()
    leaf = weight.clone().requires_grad_()
    targets = torch.ones(256, dtype=torch.long)
    chunked_mimic_loss(hidden, Head(leaf), targets, [], lm_weight=1.0).loss.backward()
    torch.testing.assert_close(leaf.grad, torch.tensor([[400.0], [-400.0]]).half())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_other_types_agree_with_the_sums_too(dtype, tolerance):
    tensors = large(dtype, rows=32)
    total, *expected = mimic_sums("forward_kl", *tensors, temperature=2.0)
    loss, found = scaled_gradients(*tensors, items=1024, temperature=2.0, rows_per_chunk=12)
    assert loss == pytest.approx(total / 1024, rel=tolerance)
    for gradient, sums in zip(found, expected, strict=True):
        assert relative_error(gradient, sums / 1024) < tolerance
