"""Sampled caches: what is drawn is the teacher's distribution in the mean, and so is the student's gradient."""

import math

import pytest
import torch

from helpers.cached_teacher_cases import ALL, NUM_ROWS, TEMPERATURE, read, recipe, write
from llava_mod_hf.commands import mimic
from llava_mod_hf.commands.cache_teacher import CacheCommand
from llava_mod_hf.losses.divergences import top_k_forward_kl
from llava_mod_hf.losses.rows import Head, ProjectedRows
from llava_mod_hf.teachers.cached_teacher import CachedTeacher
from llava_mod_hf.teachers.kept_answers import Sample, TopK, systematic_draws

VOCABULARY, COUNT = 7, 10


@pytest.fixture
def answer():
    """Three distributions over seven tokens, one of which has a token that never comes."""
    torch.manual_seed(0)
    hidden = torch.randn(3, 4, dtype=torch.float64) * 2
    bias = torch.tensor([0.0, 0, 0, -math.inf, 0, 0, 0], dtype=torch.float64)
    return ProjectedRows(hidden, Head(torch.randn(VOCABULARY, 4, dtype=torch.float64), bias))


def distributions(answer, temperature):
    return ((answer.hidden @ answer.head.weight.T + answer.head.bias) / temperature).softmax(-1)


def counts_of(drawn):
    return torch.stack([torch.bincount(row, minlength=VOCABULARY) for row in drawn])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_the_distribution_in_the_mean_and_never_further_than_one(answer, temperature):
    p, steps = distributions(answer, temperature), 400
    mean = torch.zeros_like(p)
    for step in range(steps):
        u = torch.full((len(p),), (step + 0.5) / steps, dtype=torch.float64)
        drawn = systematic_draws(answer, COUNT, temperature, u)
        counts = counts_of(drawn)
        assert drawn.diff().min() >= 0 and (counts.sum(-1) == COUNT).all()
        assert ((counts - COUNT * p).abs() < 1).all()
        mean += counts / COUNT / steps
    assert (mean - p).abs().max() <= 1 / steps / COUNT + 1e-12
    assert (mean[:, 3] == 0).all()


def test_a_token_that_never_comes_is_not_drawn_at_the_edge():
    head = Head(torch.zeros(3, 1), torch.tensor([-math.inf, 0.0, 0.0]))
    drawn = systematic_draws(ProjectedRows(torch.zeros(1, 1), head), 4, 1.0, torch.zeros(1, dtype=torch.float64))
    assert drawn.tolist() == [[1, 1, 2, 2]]


def test_the_gradient_is_that_of_the_full_divergence_in_the_mean(answer):
    logits = torch.randn(3, VOCABULARY, dtype=torch.float64, requires_grad=True)
    p, steps = distributions(answer, TEMPERATURE), 400
    full = TEMPERATURE**2 * torch.special.xlogy(p, p).sub(p * (logits / TEMPERATURE).log_softmax(-1)).sum()
    (expected,) = torch.autograd.grad(full, logits)
    mean, values = torch.zeros_like(expected), []
    for step in range(steps):
        u = torch.full((3,), (step + 0.5) / steps, dtype=torch.float64)
        counts = counts_of(systematic_draws(answer, COUNT, TEMPERATURE, u))
        index = torch.arange(VOCABULARY).expand(3, -1)
        rows = top_k_forward_kl(logits, index, (counts / COUNT).double().log(), temperature=TEMPERATURE)
        mean += torch.autograd.grad(rows.sum(), logits)[0] / steps
        values.append(rows.sum().item())
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-3)
    assert sum(values) / steps > full.item()  # of a sample the divergence is larger
    top = torch.topk(p, 3)
    few = top_k_forward_kl(logits, top.indices, top.values.log(), temperature=TEMPERATURE)
    biased = torch.autograd.grad(few.sum(), logits)[0]
    assert (biased - expected).abs().max() > 0.01


def test_a_cache_has_what_was_drawn_whatever_the_batch(models, caches, tmp_path):
    folders = [
        write(models, tmp_path / str(batch), top_k=None, log_probs_dtype=None, num_samples=50,
              options={"per_device_train_batch_size": batch})
        for batch in (4, 3)
    ]  # fmt: skip
    first, second = map(read, folders)
    assert first[:] == second[:]
    cached = CachedTeacher(str(folders[0]))
    assert cached.settings["num_samples"] == 50 and "top_k" not in cached.settings
    assert f"50 tokens drawn from softmax(logits / {TEMPERATURE})" in (folders[0] / "README.md").read_text()
    whole = read(caches["teacher"])
    for number in range(NUM_ROWS):
        row, exact = first[number], whole[number]
        assert row["aligned"] == exact["aligned"]
        for ids, counts, tokens, log_probs in zip(
            row["token_ids"], row["counts"], exact["token_ids"], exact["log_probs"], strict=True
        ):
            assert sum(counts) == 50 and min(counts) > 0 and sorted(set(ids)) == ids
            p = dict(zip(tokens, log_probs, strict=True))
            assert all(abs(count - 50 * math.exp(p[token])) < 1 for token, count in zip(ids, counts, strict=True))


def test_what_is_read_is_padded_to_the_longest():
    kept, aligned = Sample(4, 300, seed=1), [torch.tensor([True, False, True]), torch.tensor([True])]
    head = Head(torch.eye(300)[:, :3] * torch.tensor([50.0, 50.0, 50.0]))
    hidden = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 1]])  # sure, between two, sure
    table = kept.rows(["a", "b"], [5, 6], aligned, ProjectedRows(hidden, head), 1.0).with_format("arrow")[:]
    index, log_probs = kept.read(table)
    assert index.tolist() == [[0, 0], [1, 2], [2, 0]]
    assert log_probs.exp().tolist() == [[1, 0], [0.5, 0.5], [1, 0]]
    assert table["row"].to_pylist() == [5, 6] and table["aligned"].to_pylist() == [[True, False, True], [True]]
    nothing = kept.rows(["a"], [0], [torch.tensor([False])], ProjectedRows(hidden[:0], head), 1.0)
    assert kept.read(nothing.with_format("arrow")[:])[0].shape == (0, 1)


def test_draws_follow_from_seed_and_key():
    def drawn(seed, key):
        return Sample(4, 300, seed)._uniforms(key, 3)

    assert drawn(0, "a").equal(drawn(0, "a"))
    assert not drawn(0, "a").equal(drawn(1, "a")) and not drawn(0, "a").equal(drawn(0, "b"))


def test_the_stage_trains_from_a_sample(models, tmp_path):
    folder = write(models, tmp_path / "cache", top_k=None, log_probs_dtype=None, num_samples=20)
    groups = list(recipe(models, folder, max_steps=2))
    groups[-1].output_dir = str(tmp_path / "run")
    run = mimic.run(*groups)
    assert run["steps"] == 2 and math.isfinite(run["last_loss"])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"num_samples": 0}, "`num_samples` is 0: give 1 to 65535"),
        ({"num_samples": 70_000}, "give 1 to 65535"),
        ({"num_samples": 5, "top_k": 5}, "`top_k` is of the most likely tokens"),
        ({"num_samples": 5, "log_probs_dtype": "float16"}, "`log_probs_dtype` is of the most likely"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        CacheCommand(**wrong)


def test_without_an_option_the_32_most_likely_are_kept():
    kept = CacheCommand().kept(1000, seed=3)
    assert isinstance(kept, TopK) and kept.settings() == {"vocabulary": 1000, "top_k": 32, "log_probs": "float16"}
    drawn = CacheCommand(num_samples=300).kept(1000, seed=3)
    assert drawn.settings() == {"vocabulary": 1000, "num_samples": 300, "sampling seed": 3}
    assert str(drawn.features().arrow_schema.field("counts").type.value_type.value_type) == "uint16"
    assert TopK(ALL, 1000).k == min(ALL, 1000)
