"""`kto_pair` and `margin` against sums written out in float64, value and gradient."""

import math

import pytest
import torch

from llava_mod_hf.losses.preference_losses import kto_pair_loss, margin_loss, response_sums, without_tail

BETA = 0.3
MIXED = ([1.5, -0.5, 2.0], [0.25, -3.0, 4.0])
CASES = {
    "both means positive": MIXED,
    "chosen clamped": ([-1.5, -0.5, 0.25], [0.5, 1.0, -0.2]),
    "rejected clamped": ([1.5, -0.5, 0.25], [-0.5, -1.0, -0.2]),
    "both clamped": ([-1.5, -0.5, 0.25], [-0.5, -1.0, 0.2]),
    "one pair": ([0.75], [-0.25]),
    "far away": ([300.0, -200.0], [-500.0, 900.0]),
}


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def explicit_kto(chosen, rejected, all_chosen, all_rejected):
    """Value and gradients with the KL terms held constant, in Python's floats, which are float64."""
    pairs = len(chosen)
    kl_chosen, kl_rejected = (max(0.0, math.fsum(values) / len(values)) for values in (all_chosen, all_rejected))
    total, chosen_gradient, rejected_gradient = [], [], []
    for c, r in zip(chosen, rejected, strict=True):
        p, q = sigmoid(BETA * (c - kl_rejected)), sigmoid(BETA * (kl_chosen - r))
        total += [1 - p, 1 - q]
        chosen_gradient.append(-BETA * p * (1 - p) / (2 * pairs))
        rejected_gradient.append(BETA * q * (1 - q) / (2 * pairs))
    return math.fsum(total) / (2 * pairs), chosen_gradient, rejected_gradient


def leaves(*values, dtype=torch.float64):
    return [torch.tensor(value, dtype=dtype, requires_grad=True) for value in values]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_kto_pair_is_the_sum_written_out(case, dtype):
    chosen, rejected = leaves(*CASES[case], dtype=dtype)
    loss = kto_pair_loss(chosen, rejected, beta=BETA)
    loss.backward()
    value, chosen_gradient, rejected_gradient = explicit_kto(*CASES[case], *CASES[case])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(value, abs=tolerance)
    assert chosen.grad.tolist() == pytest.approx(chosen_gradient, abs=tolerance)
    assert rejected.grad.tolist() == pytest.approx(rejected_gradient, abs=tolerance)


def test_the_kl_terms_rest_on_the_pairs_of_all_processes():
    chosen, rejected = leaves(*MIXED)
    everyone = ([*MIXED[0], -9.0, 12.5], [*MIXED[1], 7.0, 1.0])
    loss = kto_pair_loss(chosen, rejected, beta=BETA, all_logratios=tuple(torch.tensor(part) for part in everyone))
    loss.backward()
    value, chosen_gradient, rejected_gradient = explicit_kto(*MIXED, *everyone)
    assert loss.item() == pytest.approx(value, abs=1e-6)
    assert chosen.grad.tolist() == pytest.approx(chosen_gradient, abs=1e-6)
    assert rejected.grad.tolist() == pytest.approx(rejected_gradient, abs=1e-6)
    assert abs(value - explicit_kto(*MIXED, *MIXED)[0]) > 0.01, "the other processes' pairs make no difference"


def test_the_authors_kto_pair_differentiates_the_kl_terms():
    """Of their own pairs alone: the gradient is the finite difference of the value, KL terms included."""

    def value(chosen, rejected):
        return explicit_kto(chosen, rejected, chosen, rejected)[0]

    chosen, rejected = leaves(*MIXED)
    loss = kto_pair_loss(chosen, rejected, beta=BETA, reference_compat=True)
    loss.backward()
    assert loss.item() == pytest.approx(value(*MIXED), abs=1e-12)
    for side, found in enumerate((chosen.grad, rejected.grad)):
        for index in range(3):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [list(values) for values in MIXED]
                moved[side][index] += step
                ends.append(value(*moved))
            assert found[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)
    detached = leaves(*MIXED)
    kto_pair_loss(*detached, beta=BETA).backward()
    assert (chosen.grad - detached[0].grad).abs().max() > 1e-3


def test_the_authors_kto_pair_of_a_single_pair_is_no_longer_kto():
    chosen, rejected = leaves([2.0], [0.5])
    loss = kto_pair_loss(chosen, rejected, beta=BETA, reference_compat=True)
    assert loss.item() == pytest.approx(1 - sigmoid(BETA * 1.5), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_margin_is_the_sum_written_out(dtype):
    student, teacher = [1.0, -2.0, 0.5, 700.0, -3.0], [0.5, 1.0, 0.5, -200.0, 800.0]
    margins = leaves(student, dtype=dtype)[0]
    loss = margin_loss(margins, torch.tensor(teacher, dtype=dtype), beta=BETA)
    loss.backward()
    below = [t - s for s, t in zip(student, teacher, strict=True)]
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(BETA * math.fsum(max(0.0, x) for x in below) / 5, rel=1e-6)
    assert margins.grad.tolist() == pytest.approx([-BETA / 5 if x > 0 else 0.0 for x in below], abs=1e-8)


def test_margin_has_no_gradient_where_student_and_teacher_agree():
    margins = leaves([1.0, -2.0])[0]
    loss = margin_loss(margins, margins.detach().clone(), beta=BETA)
    loss.backward()
    assert loss.item() == 0 and margins.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss", [kto_pair_loss, margin_loss])
def test_low_precision_is_summed_in_float32(loss):
    parts = leaves([1.0, 0.5], [0.25, 2.0], dtype=torch.bfloat16)
    assert loss(*parts, beta=BETA).dtype == torch.float32


@pytest.mark.parametrize("loss", [kto_pair_loss, margin_loss])
@pytest.mark.parametrize("shapes", [((2,), (3,)), ((2, 1), (2, 1)), ((0,), (0,))], ids=str)
def test_numbers_that_are_not_one_per_pair_are_refused(loss, shapes):
    with pytest.raises(ValueError, match="one number per pair"):
        loss(*(torch.zeros(shape) for shape in shapes), beta=BETA)


def test_the_tail_of_a_response_is_what_is_longer_than_its_pairs_other():
    log_probs = torch.tensor([[0, -1, -2, -4, 0], [0, 0, -8, 0, 0], [0, -1, 0, 0, 0], [0, 0, -3, -5, -7]]).double()
    mask = (log_probs != 0).long()
    sums, tails = response_sums(log_probs, mask)
    assert sums.tolist() == [-7, -8, -1, -15]
    assert tails.tolist() == [-6, 0, 0, -12]
    assert without_tail(sums, tails, 0.25).tolist() == [-2.5, -8, -1, -6]
    assert without_tail(sums, tails, None) is sums
