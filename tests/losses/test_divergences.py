"""The losses against sums written out in float64: value and gradient."""

import itertools
import math

import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from helpers.oracles import explicit_divergence, softmax, top_k
from llava_mod_hf.losses.divergences import (
    DIVERGENCES,
    divergence_rows,
    mimic_loss,
    top_k_forward_kl,
)
from llava_mod_hf.losses.rows import shift_for_next_token

BATCH, SEQUENCE, VOCABULARY = 2, 5, 7
# position 0 has no predecessor: its label must not count, although it is not −100
LABELS = torch.tensor([[3, -100, 1, 2, -100], [-100, -100, 6, -100, 0]])
PREDICTING = [(0, 1), (0, 2), (1, 1), (1, 3)]


def random_logits(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def student_and_teacher(dtype=torch.float64):
    student, teacher = (random_logits(seed, BATCH, SEQUENCE, VOCABULARY, dtype=dtype) for seed in (0, 1))
    return student.requires_grad_(), teacher


def explicit_mimic(student, teacher, temperature, num_items, name="forward_kl", beta=0.5):
    """Value and gradient with respect to the student's logits, position by position."""
    value, gradient = 0.0, torch.zeros(student.shape, dtype=torch.float64)
    for place in PREDICTING:
        row, row_gradient = explicit_divergence(
            name, student[place].tolist(), teacher[place].tolist(), temperature, beta
        )
        value += row / num_items
        gradient[place] = torch.tensor(row_gradient, dtype=torch.float64) / num_items
    return value, gradient


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("num_items", [None, 11, torch.tensor(11)])
def test_mimic_loss_is_the_explicit_sum(temperature, num_items):
    student, teacher = student_and_teacher()
    loss = mimic_loss(student, teacher, LABELS, temperature=temperature, num_items=num_items)
    loss.backward()
    divisor = len(PREDICTING) if num_items is None else int(num_items)
    value, gradient = explicit_mimic(student.detach(), teacher, temperature, divisor)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(student.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", [0.5, 0.2])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_each_divergence_is_the_explicit_sum(divergence, temperature, beta):
    student, teacher = student_and_teacher()
    loss = mimic_loss(student, teacher, LABELS, divergence=divergence, temperature=temperature, jsd_beta=beta)
    loss.backward()
    value, gradient = explicit_mimic(student.detach(), teacher, temperature, len(PREDICTING), divergence, beta)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(student.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_that_of_gkd(beta):
    student, teacher = (random_logits(seed, 20, VOCABULARY) for seed in (2, 3))
    found = divergence_rows(student, teacher, divergence="jsd", jsd_beta=beta).sum()
    # its sum over rows and tokens is divided by the number of rows
    expected = 20 * GKDTrainer.generalized_jsd_loss(student[None], teacher[None], torch.zeros(1, 20), beta=beta)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_token_that_both_exclude_changes_no_divergence(divergence):
    student, teacher = (random_logits(seed, 4, VOCABULARY) for seed in (2, 3))
    less = [torch.cat([logits[:, :2], logits[:, 3:]], -1) for logits in (student, teacher)]
    student[:, 2] = teacher[:, 2] = -math.inf
    student.requires_grad_()
    found = divergence_rows(student, teacher, divergence=divergence)
    found.sum().backward()
    torch.testing.assert_close(found, divergence_rows(*less, divergence=divergence))
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"divergence": "kl"}, {"temperature": 0.0}, {"jsd_beta": 0.0}, {"jsd_beta": 1.0}])
def test_options_that_cannot_be_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"`{name}` is {value!r}"):
        mimic_loss(*student_and_teacher(), LABELS, **options)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 3])
def test_top_k_forward_kl_is_the_explicit_sum_over_buckets(k, temperature):
    student, teacher = (random_logits(seed, 5, VOCABULARY) for seed in (2, 3))
    index, log_probs = top_k(teacher, k, temperature)
    student.requires_grad_()
    found = top_k_forward_kl(student, index, log_probs, temperature=temperature)
    found.sum().backward()
    for row in range(5):
        ps, pt = (softmax((logits[row] / temperature).tolist()) for logits in (student, teacher))
        listed = index[row].tolist()
        rest_s, rest_t = (sum(p[v] for v in range(VOCABULARY) if v not in listed) for p in (ps, pt))
        value = sum(pt[v] * math.log(pt[v] / ps[v]) for v in listed) + rest_t * math.log(rest_t / rest_s)
        gradient = [ps[v] - pt[v] if v in listed else ps[v] * (1 - rest_t / rest_s) for v in range(VOCABULARY)]
        assert found[row].item() == pytest.approx(value * temperature**2, rel=1e-10)
        expected = temperature * torch.tensor(gradient, dtype=torch.float64)
        torch.testing.assert_close(student.grad[row], expected, rtol=1e-9, atol=1e-12)


def test_top_k_forward_kl_grows_to_the_full_one():
    student, teacher = (random_logits(seed, 20, VOCABULARY) for seed in (2, 3))
    values = [top_k_forward_kl(student, *top_k(teacher, k)) for k in range(1, VOCABULARY + 1)]
    assert all((one <= other + 1e-12).all() for one, other in itertools.pairwise(values))
    torch.testing.assert_close(values[-1], divergence_rows(student, teacher))


def test_padded_entries_of_a_cache_count_for_nothing():
    student, teacher = (random_logits(seed, 4, VOCABULARY) for seed in (2, 3))
    index, log_probs = top_k(teacher, 2)
    padding = torch.zeros(4, 2, dtype=torch.long)  # token 0, which another entry or the rest may hold
    padded = torch.cat([index, padding], -1), torch.cat([log_probs, torch.full((4, 2), -math.inf)], -1)
    assert (index != 0).any(), "some row should have token 0 in the rest"
    student.requires_grad_()
    found = top_k_forward_kl(student, *padded)
    found.sum().backward()
    torch.testing.assert_close(found, top_k_forward_kl(student, index, log_probs))
    assert student.grad.isfinite().all()


def test_a_student_that_gives_the_rest_nothing_has_a_finite_gradient():
    student = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    index, log_probs = top_k(torch.tensor([[2.0, 1.0, 0.0]]), 1)
    top_k_forward_kl(student, index, log_probs).sum().backward()
    assert student.grad.isfinite().all()


def test_mimic_loss_is_zero_where_the_student_is_the_teacher():
    student, _ = student_and_teacher()
    loss = mimic_loss(student, student.detach().clone(), LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_items", [None, 0, 5])
def test_mimic_loss_without_supervised_tokens_is_exactly_zero(num_items):
    student, teacher = student_and_teacher()
    labels = torch.full_like(LABELS, -100)
    labels[:, 0] = 1  # nothing predicts the first token
    loss = mimic_loss(student, teacher, labels, num_items=num_items)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_a_token_that_the_teacher_excludes_contributes_nothing():
    student, teacher = student_and_teacher()
    teacher[..., 2] = -math.inf
    loss = mimic_loss(student, teacher, LABELS)
    loss.backward()
    expected = torch.zeros((), dtype=torch.float64)
    for row, position in PREDICTING:
        p = teacher[row, position].softmax(-1)
        kept = [token for token in range(VOCABULARY) if token != 2]
        expected += (p * (teacher[row, position].log_softmax(-1) - student[row, position].log_softmax(-1)))[kept].sum()
    assert loss.item() == pytest.approx(expected.item() / len(PREDICTING), rel=1e-12)
    assert student.grad.isfinite().all()


def test_a_token_that_both_exclude_contributes_nothing():
    student, teacher = (logits.detach() for logits in student_and_teacher())
    student[..., 2] = teacher[..., 2] = -math.inf
    student.requires_grad_()
    mimic_loss(student, teacher, LABELS).backward()
    assert student.grad.isfinite().all()


def test_bf16_logits_are_compared_in_float32():
    student, teacher = student_and_teacher(torch.bfloat16)
    loss = mimic_loss(student, teacher, LABELS)
    loss.backward()
    value, gradient = explicit_mimic(student.detach().double(), teacher.double(), 1.0, len(PREDICTING))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(student.grad, gradient.bfloat16(), rtol=2**-7, atol=1e-6)


def test_forward_kl_is_per_row_and_not_negative():
    student, teacher = (random_logits(seed, 20, VOCABULARY) for seed in (2, 3))
    divergence = divergence_rows(student, teacher)
    assert divergence.shape == (20,)
    assert (divergence > 0).all()
    assert not torch.allclose(divergence, divergence_rows(teacher, student))


@pytest.mark.parametrize("shape", [(BATCH, SEQUENCE, VOCABULARY + 1), (BATCH, SEQUENCE + 1, VOCABULARY)])
def test_mimic_loss_names_shapes_that_do_not_fit(shape):
    student, _ = student_and_teacher()
    with pytest.raises(ValueError) as error:
        mimic_loss(student, torch.zeros(shape), LABELS)
    assert str(tuple(student.shape)) in str(error.value)
    assert str(shape) in str(error.value)


def test_mimic_loss_refuses_labels_of_another_length():
    student, teacher = student_and_teacher()
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        mimic_loss(student, teacher, LABELS[:, 1:])


def test_shift_for_next_token():
    keep, targets = shift_for_next_token(LABELS)
    assert keep.nonzero().tolist() == [list(position) for position in PREDICTING]
    assert targets.tolist() == [1, 2, 6, 0]
