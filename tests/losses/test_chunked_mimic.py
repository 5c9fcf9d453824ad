"""The mimic loss from hidden states and heads: value and gradients against float64 sums, whatever the chunks."""

import math
import re

import pytest
import torch
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from helpers.chunked_mimic_cases import ROWS, SHARED, VOCABULARY, tensors
from helpers.oracles import explicit_divergence, softmax, top_k
from llava_mod_hf.losses import chunked_mimic
from llava_mod_hf.losses.chunked_mimic import chunked_mimic_loss
from llava_mod_hf.losses.divergences import DIVERGENCES, top_k_forward_kl
from llava_mod_hf.losses.rows import Head, ProjectedRows, TopKRows

CHUNKS = [1, 3, 7, 256]


# parameters: those of the loss that it writes out
def explicit(t, *, name, temperature=1.0, beta=0.5, kl_weight=1.0, lm_weight=0.0, items=ROWS, size=VOCABULARY,
             softcap=None, scale=1.0, aligned=None):  # fmt: skip
    """
    Loss and gradients of hidden states, weight and bias, row by row and token by token in float64.

    Without softcap and scale: `d/dz` of each row is the sum of the terms' own, `d/dh = Wᵀ dz`, `d/dW = dz hᵀ`.
    """
    t = {key: value.double() if value.is_floating_point() else value for key, value in t.items()}
    loss = 0.0
    grads = {key: torch.zeros_like(t[key]) for key in ("hidden", "weight", "bias")}
    for row in range(ROWS):
        projected = [scale * (t["weight"][v] @ t["hidden"][row] + t["bias"][v]).item() for v in range(VOCABULARY)]
        logits = projected if softcap is None else [softcap * math.tanh(z / softcap) for z in projected]
        teacher = [(t["teacher_weight"][v] @ t["teacher"][row]).item() for v in range(size)]
        target, p = t["targets"][row].item(), softmax(logits)
        lm = -math.log(p[target])
        lm_gradient = [p[v] - (v == target) for v in range(VOCABULARY)]
        if aligned is None or aligned[row]:
            kl, kl_gradient = explicit_divergence(name, logits[:size], teacher, temperature, beta)
            kl_gradient += [0.0] * (VOCABULARY - size)
        else:
            kl, kl_gradient = lm, lm_gradient
        loss += (kl_weight * kl + lm_weight * lm) / items
        for v in range(VOCABULARY):
            dz = (kl_weight * kl_gradient[v] + lm_weight * lm_gradient[v]) / items * scale
            if softcap is not None:
                dz *= 1 - math.tanh(projected[v] / softcap) ** 2
            grads["hidden"][row] += dz * t["weight"][v]
            grads["weight"][v] += dz * t["hidden"][row]
            grads["bias"][v] += dz
    return loss, grads


def run(t, *, with_bias=True, softcap=None, scale=1.0, teachers=None, rows=256, factor=1.0, size=VOCABULARY, **options):
    leaves = {key: t[key].clone().requires_grad_() for key in ("hidden", "weight", "bias")}
    head = Head(leaves["weight"], leaves["bias"] if with_bias else None, softcap, scale)
    if teachers is None:
        teachers = [ProjectedRows(t["teacher"], Head(t["teacher_weight"]))]
    terms = chunked_mimic_loss(
        leaves["hidden"], head, t["targets"], teachers, rows_per_chunk=rows, shared_vocab_size=size, **options
    )
    (factor * terms.loss).backward()
    return terms, {key: leaf.grad for key, leaf in leaves.items()}


@pytest.mark.parametrize("rows", CHUNKS)
@pytest.mark.parametrize(
    ("temperature", "lm_weight", "options"),
    [(1.0, 0.0, {}), (2.5, 0.3, {"softcap": 2.0, "scale": 0.5}), (2.5, 0.0, {"size": SHARED}), (1.0, 0.3, {"size": 5})],
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_and_gradients_are_the_explicit_sums(divergence, temperature, lm_weight, options, rows):
    t = tensors()
    common = {"temperature": temperature, "lm_weight": lm_weight, "kl_weight": 0.7, **options}
    loss, grads = explicit(t, name=divergence, beta=0.3, items=11, **common)
    terms, found = run(t, divergence=divergence, jsd_beta=0.3, num_items=11, rows=rows, factor=3.0, **common)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-10)
    for name, gradient in grads.items():
        torch.testing.assert_close(found[name], 3 * gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rows", CHUNKS)
def test_rows_that_the_teacher_leaves_out_are_learnt_from_their_targets(rows):
    t = tensors()
    aligned = torch.tensor([True, False, True, True, False, False, True])
    loss, grads = explicit(t, name="forward_kl", temperature=2.0, kl_weight=0.7, lm_weight=0.3, aligned=aligned)
    teachers = [ProjectedRows(t["teacher"][aligned], Head(t["teacher_weight"]), aligned)]
    options = {"teachers": teachers, "temperature": 2.0, "kl_weight": 0.7, "rows": rows}
    terms, found = run(t, lm_weight=0.3, **options)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-10)
    for name, gradient in grads.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)

    _, found = run(t, targets_for_unaligned=False, **options)
    assert (found["hidden"][~aligned] == 0).all()
    assert (found["hidden"][aligned] != 0).any(-1).all()


@pytest.mark.parametrize("rows", CHUNKS)
def test_a_cached_teacher_is_the_sum_over_its_rows(rows):
    t = tensors()
    aligned = torch.tensor([True, False, True, True, False, False, True])
    index, log_probs = top_k(t["teacher"][aligned] @ t["teacher_weight"][:SHARED].T, 3, 2.0)
    terms, found = run(
        t, teachers=[TopKRows(index, log_probs, aligned)], temperature=2.0, size=SHARED, rows=rows, lm_weight=0.0
    )
    leaves = [t[key].clone().requires_grad_() for key in ("hidden", "weight", "bias")]
    logits = leaves[0] @ leaves[1].T + leaves[2]
    divergence = top_k_forward_kl(logits[aligned][:, :SHARED], index, log_probs, temperature=2.0).sum()
    others = -logits.log_softmax(-1).gather(-1, t["targets"][:, None])[~aligned].sum()
    expected = torch.autograd.grad((divergence + others) / ROWS, leaves)
    assert terms.loss.item() == pytest.approx(((divergence + others) / ROWS).item(), rel=1e-12)
    for name, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(found[name], gradient)


def test_several_teachers_are_a_weighted_sum():
    t = tensors()
    other = tensors(seed=1)
    first = ProjectedRows(t["teacher"], Head(t["teacher_weight"]))
    second = ProjectedRows(other["teacher"], Head(other["teacher_weight"]))
    one, two = (run(t, teachers=[teacher]) for teacher in (first, second))
    both, found = run(t, teachers=[first, second], teacher_weights=[0.8, 0.5])
    assert both.loss.item() == pytest.approx(0.8 * one[0].loss.item() + 0.5 * two[0].loss.item())
    torch.testing.assert_close(both.kl, torch.cat([one[0].kl, two[0].kl]))
    torch.testing.assert_close(found["weight"], 0.8 * one[1]["weight"] + 0.5 * two[1]["weight"])
    mean, _ = run(t, teachers=[first, second])
    assert mean.loss.item() == pytest.approx((one[0].loss.item() + two[0].loss.item()) / 2)


def test_the_terms_are_sums_over_rows():
    t = tensors()
    logits = t["hidden"] @ t["weight"].T + t["bias"]
    t["targets"][:3] = logits.argmax(-1)[:3]
    terms, _ = run(t, lm_weight=0.3, rows=3)
    loss, _ = explicit(t, name="forward_kl", items=1)
    assert terms.kl.tolist() == [pytest.approx(loss)]
    assert terms.lm.item() == pytest.approx(-logits.log_softmax(-1).gather(-1, t["targets"][:, None]).sum().item())
    assert terms.correct.item() == (logits.argmax(-1) == t["targets"]).sum().item() >= 3


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_it_is_what_trls_kernel_computes(beta):
    t = tensors(torch.float32)
    name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    teacher_weight = t["teacher_weight"][:VOCABULARY]
    leaves = [t[key].clone().requires_grad_() for key in ("hidden", "weight", "bias")]
    rows, _ = ChunkedDivergenceFunction.apply(*leaves, t["teacher"], teacher_weight, None, beta, 2.0)
    # TRL's has no factor T²
    (4 * rows.sum() / ROWS).backward()
    terms, found = (
        run(t, divergence=name, jsd_beta=beta or 0.5, temperature=2.0)
        if 0 < beta < 1
        else run(t, divergence=name, temperature=2.0)
    )
    assert terms.loss.item() == pytest.approx(4 * rows.sum().item() / ROWS, rel=1e-4)
    for leaf, gradient in zip(leaves, found.values(), strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 256])
def test_bf16_heads_are_compared_in_float32(rows):
    t = tensors(torch.bfloat16)
    loss, grads = explicit(t, name="forward_kl", lm_weight=0.3)
    terms, found = run(t, lm_weight=0.3, rows=rows)
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(loss, rel=0.02)
    largest = max(gradient.abs().max().item() for gradient in grads.values())
    for name, gradient in grads.items():
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name].double(), gradient, rtol=0.03, atol=0.02 * largest)


def test_the_heads_gradient_is_summed_over_chunks_in_float32():
    t = tensors(torch.bfloat16)
    count = 280
    many = {key: value[:1].expand(count, *value.shape[1:]) for key, value in t.items() if len(value) == ROWS}
    t.update(many)
    _, one = run(t, rows=1, num_items=1)
    _, whole = run(t, rows=count, num_items=1)
    # in bf16 a sum of 280 equal terms stalls: each is below half of its last digit
    torch.testing.assert_close(one["weight"], whole["weight"], rtol=0.02, atol=0.5)


def test_under_autocast_it_projects_as_the_models_head_would():
    t = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        terms, found = run(t)
    expected, _ = run(tensors(torch.bfloat16))
    assert terms.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", None])
def test_only_what_is_trained_has_a_gradient(trained):
    t = tensors()
    leaves = {key: t[key].clone().requires_grad_(key == trained) for key in ("hidden", "weight", "bias")}
    teachers = [ProjectedRows(t["teacher"], Head(t["teacher_weight"]))]
    terms = chunked_mimic_loss(
        leaves["hidden"],
        Head(leaves["weight"], leaves["bias"]),
        t["targets"],
        teachers,
        rows_per_chunk=3,
        shared_vocab_size=VOCABULARY,
    )
    assert terms.loss.requires_grad == (trained is not None)
    if trained:
        terms.loss.backward()
        _, grads = explicit(t, name="forward_kl")
        torch.testing.assert_close(leaves[trained].grad, grads[trained])
    assert all(leaf.grad is None for key, leaf in leaves.items() if key != trained)


def test_a_head_tied_to_the_embeddings_gets_both_gradients():
    t = tensors()
    ids = torch.arange(ROWS)
    tied = t["weight"].clone().requires_grad_()
    teachers = [ProjectedRows(t["teacher"], Head(t["teacher_weight"]))]
    chunked_mimic_loss(
        torch.nn.functional.embedding(ids, tied), Head(tied), t["targets"], teachers, shared_vocab_size=VOCABULARY
    ).loss.backward()
    t["hidden"], t["bias"] = t["weight"][ids], torch.zeros(VOCABULARY, dtype=torch.float64)
    _, grads = explicit(t, name="forward_kl")
    grads["weight"][ids] += grads["hidden"]
    torch.testing.assert_close(tied.grad, grads["weight"])


def test_without_a_gradient_the_value_is_the_same():
    t = tensors()
    teachers = [ProjectedRows(t["teacher"], Head(t["teacher_weight"]))]
    with torch.no_grad():
        terms, = [
            chunked_mimic_loss(
                t["hidden"].requires_grad_(), Head(t["weight"], t["bias"]), t["targets"], teachers,
                shared_vocab_size=VOCABULARY,
            )
        ]  # fmt: skip
    assert terms.loss.item() == pytest.approx(run(tensors())[0].loss.item())
    assert not terms.loss.requires_grad


@pytest.mark.parametrize("teachers", [0, 1])
def test_no_rows_are_a_loss_of_zero_with_gradients_of_zero(teachers):
    t = tensors()
    t.update({key: t[key][:0] for key in ("hidden", "targets", "teacher")})
    rows = [ProjectedRows(t["teacher"], Head(t["teacher_weight"]))] * teachers
    terms, found = run(t, teachers=rows, lm_weight=0.5)
    assert terms.loss.item() == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found.values())


def test_no_more_than_a_chunk_is_projected_at_a_time(monkeypatch):
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(chunked_mimic.F, "linear", lambda x, *args: seen.append(len(x)) or linear(x, *args))
    run(tensors(), rows=3)
    assert seen == [3, 3, 3, 3, 1, 1], "student and teacher, each of three chunks once"


def test_a_second_backward_pass_is_refused():
    t = tensors()
    hidden = t["hidden"].requires_grad_()
    loss = chunked_mimic_loss(hidden, Head(t["weight"]), t["targets"], [], lm_weight=1.0).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once per forward pass"):
        loss.backward()


def test_inputs_that_do_not_fit_are_refused():
    t = tensors()
    index, log_probs = top_k(t["teacher"] @ t["teacher_weight"][:VOCABULARY].T, 3)
    live = ProjectedRows(t["teacher"], Head(t["teacher_weight"][:SHARED]))
    cases = [
        ({"teachers": [live]}, "teacher's head has 8 tokens, the student's 9"),
        ({"teachers": [ProjectedRows(t["teacher"][1:], Head(t["teacher_weight"]))]}, "6 rows where 7"),
        ({"teachers": [TopKRows(index, log_probs)], "divergence": "jsd"}, "'jsd', and a cached teacher"),
        ({"teacher_weights": [0.5, 0.5]}, "1 teachers and 2 `teacher_weights`"),
        ({"teachers": [TopKRows(index, log_probs)], "size": 5}, "the first 5 tokens are compared"),
        ({"teachers": [TopKRows(index - VOCABULARY, log_probs)]}, "most likely tokens have the id -"),
        ({"rows": 0}, "`rows_per_chunk` is 0"),
        ({"divergence": "kl"}, "`divergence` is 'kl'"),
        ({"size": VOCABULARY + 1}, "give the number that both have"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            run(t, **options)
    with pytest.raises(ValueError, match="7 rows of hidden states and 6 targets"):
        run({**t, "targets": t["targets"][1:]})


def test_the_entropy_is_that_of_the_students_distribution():
    t = tensors()
    logits = 2.0 * torch.tanh((t["hidden"] @ t["weight"].T + t["bias"]) / 2.0)
    expected = sum(-q * math.log(q) for row in logits.tolist() for q in softmax(row))
    terms, _ = run(t, softcap=2.0, temperature=3.0, rows=3)
    assert terms.entropy.item() == pytest.approx(expected)
    assert not terms.entropy.requires_grad
    t["bias"][2] = -math.inf  # a token that is excluded
    t["targets"].fill_(0)
    terms, _ = run(t, teachers=[], lm_weight=1.0)
    less = t["hidden"] @ t["weight"].T + t["bias"]
    expected = sum(-q * math.log(q) for row in less.tolist() for q in softmax(row) if q)
    assert terms.entropy.item() == pytest.approx(expected)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_the_first_rows_of_a_teacher_are_those_of_the_first_rows_of_the_student(count):
    t = tensors()
    aligned = torch.tensor([True, False, True, True, False, False, True])
    index, log_probs = top_k(t["teacher"] @ t["teacher_weight"].T, 3)
    head, before = Head(t["teacher_weight"]), aligned[:count]
    listed = index[:count][before], log_probs[:count][before], before
    cases = [
        (ProjectedRows(t["teacher"], head), ProjectedRows(t["teacher"][:count], head)),
        (ProjectedRows(t["teacher"][aligned], head, aligned), (t["teacher"][:count][before], head, before)),
        (TopKRows(index[aligned], log_probs[aligned], aligned), listed),
    ]
    for teacher, expected in cases:
        for found, part in zip(teacher.first(count), expected, strict=True):
            assert found is part or torch.equal(found, part)
