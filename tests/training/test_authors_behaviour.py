"""The authors' behaviours by name: each does what it says, and how far that is from ours."""

import copy

import pytest
import torch
from torch.nn import functional as F

from helpers.ddp_gradients import assert_gradients_close, mimic_trainer, raw_gradients, sharpened
from llava_mod_hf import MimicConfig
from llava_mod_hf.losses.divergences import divergence_rows
from llava_mod_hf.model.moe_llava_mod import LlavaModTopKRouter
from llava_mod_hf.training.authors_behaviour import BEHAVIOURS, ReferenceCompat, add_gumbel_second_expert

# Measured here, on random models of width 32 and four rows of easy-VQA; quoted in docs/divergences.md.
UNSHIFTED_COSINE, ENTROPY, SLICE_DIFFERENCE, SLICE_LOST, GUMBEL_SHARE = 0.506, 4.023, -0.043, 0.501, 0.667


@pytest.fixture
def models(make_student):
    return lambda: (sharpened(make_student(moe_layers=(0, 2), seed=0)), sharpened(make_student(moe_layers=[], seed=1)))


@pytest.fixture
def run(models, processor, tmp_path):
    """`run(**options)`: the trainer after its first step, that step's raw gradients, and what it logged."""

    def run(**options):
        trainer = mimic_trainer(*models(), processor, tmp_path, **{"temperature": 1.0, "lm_weight": 0.0, **options})
        gradients = raw_gradients(trainer)
        return trainer, gradients, trainer.state.log_history[0]

    return run


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(4)])


def gradients_of(student, loss):
    loss.backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def cosine(one, other):
    flat = [torch.cat([gradients[name].flatten() for name in sorted(one)]) for gradients in (one, other)]
    return F.cosine_similarity(*flat, dim=0).item()


def test_unshifted_mask(run, models):
    trainer, found, logs = run(reference_compat=["unshifted_mask"], lm_weight=0.5)
    student, teacher = models()
    batch = batch_of(trainer)
    labels = batch.pop("labels")
    # the longest row's last token has no position after it in the batch: one is added, and masked
    assert (labels[:, -1] != -100).any()
    keep = labels != -100
    logits = student(**batch).logits
    with torch.no_grad():
        teacher_logits = teacher(**batch).logits
    kl = divergence_rows(logits[keep], teacher_logits[keep]).sum()
    lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    expected = gradients_of(student, (kl + 0.5 * lm) / keep.sum())
    assert_gradients_close(found, expected)
    assert logs["kl"] == pytest.approx(kl.item() / keep.sum().item(), rel=1e-5)
    assert logs["lm_loss"] == pytest.approx(lm.item() / keep.sum().item(), rel=1e-5)

    # how far the two are apart: each row's first response token is not distilled, 4 of 12
    first = sum(1 for row in keep if row.any())
    assert (first, int(keep.sum())) == (4, 12)
    _, ours, _ = run()
    _, theirs, _ = run(reference_compat=["unshifted_mask"])
    assert cosine(ours, theirs) == pytest.approx(UNSHIFTED_COSINE, abs=0.02)


def test_soft_cross_entropy(run, models):
    trainer, ours, our_logs = run()
    _, found, logs = run(reference_compat=["soft_cross_entropy"])
    assert_gradients_close(found, ours)
    _, teacher = models()
    batch = batch_of(trainer)
    keep = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        p = teacher(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1][keep].softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean().item()
    assert entropy > 0.1
    assert logs["kl"] - our_logs["kl"] == pytest.approx(entropy, rel=1e-4)
    assert entropy == pytest.approx(ENTROPY, abs=0.02)


def test_router_aux_twice(run):
    _, once, _ = run(router_aux_loss_coef=0.5)
    _, twice, logs = run(router_aux_loss_coef=0.5, reference_compat=["router_aux_twice"])
    _, double, _ = run(router_aux_loss_coef=1.0)
    assert_gradients_close(twice, double)
    assert logs["loss"] == pytest.approx(logs["kl"] + 2 * 0.5 * logs["aux_loss"], rel=1e-5)
    name = "model.language_model.layers.0.mlp.gate.weight"
    assert not torch.allclose(once[name], twice[name], rtol=1e-2)


def test_vocab_slice(run, models):
    size = 200
    trainer, found, logs = run(reference_compat=["vocab_slice"], reference_vocab_size=size)
    _, ours, our_logs = run()
    student, teacher = models()
    batch = batch_of(trainer)
    labels = batch.pop("labels")
    keep = labels[:, 1:] != -100
    with torch.no_grad():
        teacher_logits = teacher(**batch).logits[:, :-1][keep]
    logits = student(**batch).logits[:, :-1][keep]
    expected = gradients_of(student, divergence_rows(logits[:, :size], teacher_logits[:, :size]).mean())
    assert_gradients_close(found, expected)
    assert our_logs["kl"] - logs["kl"] == pytest.approx(SLICE_DIFFERENCE, abs=0.02)
    lost = teacher_logits.softmax(-1)[:, size:].sum(-1).mean().item()
    assert lost == pytest.approx(SLICE_LOST, abs=0.02), "the teacher's probability beyond the slice"

    _, whole, _ = run(reference_compat=["vocab_slice"], reference_vocab_size=151_936)
    assert_gradients_close(whole, ours)


@torch.no_grad()
def test_gumbel_second_expert(models, processor, tmp_path):
    student, teacher = models()
    batch = batch_of(mimic_trainer(student, teacher, processor, tmp_path))
    torch.manual_seed(0)
    before = student(**batch).loss
    assert torch.equal(before, student(**batch).loss)
    chosen = {True: [], False: []}
    routers = [module for module in student.modules() if isinstance(module, LlavaModTopKRouter)]
    for noisy in (False, True):
        handles = add_gumbel_second_expert(student) if noisy else []
        handles += [
            router.register_forward_hook(lambda *args, noisy=noisy: chosen[noisy].append(args[2][2]))
            for router in routers
        ]
        first, second = (student.eval()(**batch).loss for _ in range(2))
        assert torch.equal(first, second) != noisy
        for handle in handles:
            handle.remove()
    plain, noisy = (torch.cat(chosen[key]) for key in (False, True))
    assert torch.equal(plain[:, 0], noisy[:, 0])
    share = (plain[:, 1] != noisy[:, 1]).float().mean().item()
    assert share == pytest.approx(GUMBEL_SHARE, abs=0.05), "tokens whose second expert is another, in evaluation"
    assert torch.equal(student(**batch).loss, before), "the handles end it"


@torch.no_grad()
def test_noise_picks_the_second_expert_by_its_probability():
    config = type("Config", (), {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 4})
    router = LlavaModTopKRouter(config)
    router.weight.copy_(torch.eye(4))
    add_gumbel_second_expert(router)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    torch.manual_seed(0)
    found, weights, index = router(logits.expand(20_000, 4))
    torch.testing.assert_close(found[0], logits)
    assert (index[:, 0] == 0).all()
    frequency = torch.bincount(index[:, 1], minlength=4) / 20_000
    torch.testing.assert_close(frequency[1:], logits[1:].softmax(-1), atol=0.015, rtol=0)
    gates = logits.softmax(-1)[index[:, 1]]
    torch.testing.assert_close(weights[:, 1], gates / (gates + logits.softmax(-1)[0]))


def test_the_trainer_gives_the_routers_their_noise(models, processor, tmp_path):
    student, teacher = models()
    mimic_trainer(student, teacher, processor, tmp_path, reference_compat=["gumbel_second_expert"])
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert not torch.equal(student.eval()(ids).logits, student(ids).logits)


def test_names_and_sizes_that_cannot_be_are_refused(models, processor, tmp_path):
    for options, message in [
        ({"reference_compat": ["vocab"]}, f"has 'vocab': give some of {', '.join(BEHAVIOURS)}"),
        ({"reference_compat": ["vocab_slice"]}, "`reference_vocab_size` is None"),
        ({"reference_vocab_size": 10}, "`reference_vocab_size` is 10"),
    ]:
        with pytest.raises(ValueError, match=message):
            MimicConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    _, dense = models()
    with pytest.raises(ValueError, match="top-2 routing, and this model has 0 routers"):
        add_gumbel_second_expert(dense)
    cached = type("Cached", (), {})()
    with pytest.raises(ValueError, match="read the student's own tokens"):
        ReferenceCompat(["unshifted_mask"]).prepare(copy.deepcopy(dense), [cached])
