"""The mimic trainer: raw gradients against plain losses on full logits, whatever the split."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration

from helpers.ddp_gradients import (
    EVALUATED,
    KL_WEIGHT,
    LM_WEIGHT,
    TEMPERATURE,
    assert_gradients_close,
    gradients_of_two_processes,
    half_text_rows,
    raw_gradients,
    rows,
    smaller_images,
    text_rows,
)
from helpers.oracles import router_aux_loss
from llava_mod_hf.losses.chunked_mimic import chunked_mimic_loss
from llava_mod_hf.losses.divergences import mimic_loss
from llava_mod_hf.students.router_bias import router_biases
from llava_mod_hf.training import mimic_trainer as mimic_trainer_module

SPLITS = [(4, 1), (2, 2), (1, 4)]


def batch_of(trainer, indices):
    dataset = trainer.train_dataset
    return trainer.data_collator([dataset[i] for i in indices])


def explicit_terms(student, teacher, batch):
    """Sums of KL and LM terms from the logits of every position, the number of tokens, and the router logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    sparse = bool(student.config.moe_layers)
    outputs = student(**inputs, output_router_logits=sparse)
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits
    kl = mimic_loss(outputs.logits, teacher_logits, labels, temperature=TEMPERATURE, num_items=1)
    lm = F.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    aux = None
    if sparse:
        aux = router_aux_loss(outputs.router_logits, attention_mask=batch["attention_mask"])
    return kl, lm, (labels[:, 1:] != -100).sum().item(), aux


def gradients_of(student, loss):
    student.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    return found


def explicit_gradients(student, teacher, batch):
    kl, lm, tokens, _ = explicit_terms(student, teacher, batch)
    return gradients_of(student, (KL_WEIGHT * kl + LM_WEIGHT * lm) / tokens)


def aux_gradients(student, teacher, batches):
    """Gradient of the mean over the batches of the router aux."""
    return gradients_of(student, sum(explicit_terms(student, teacher, batch)[3] for batch in batches) / len(batches))


def differences(with_aux, without, names):
    """What the router aux adds; parameters that it does not reach have no gradient of it at all."""
    assert all(torch.allclose(with_aux[n], without[n], atol=1e-6) for n in with_aux.keys() - names)
    return {name: with_aux[name] - without[name] for name in names}


@pytest.mark.parametrize("moe_layers", [(), (0, 2)], ids=["dense", "sparse"])
def test_gradients_are_those_of_the_plain_losses_for_every_split(models, trainer_of, moe_layers):
    expected = None
    for batch, accumulation in SPLITS:
        student, teacher = models(moe_layers)
        trainer = trainer_of(student, teacher, batch=batch, accumulation=accumulation)
        if expected is None:
            counts = [(batch_of(trainer, [i])["labels"] != -100).sum().item() for i in range(4)]
            assert counts[0] + counts[1] != counts[2] + counts[3], "the micro-batches need unequal token counts"
            expected = explicit_gradients(student, teacher, batch_of(trainer, range(4)))
        assert_gradients_close(raw_gradients(trainer), expected)


def test_a_stock_llava_teaches_as_ours_does(models, trainer_of):
    student, teacher = models()
    config = LlavaConfig(
        vision_config=teacher.config.vision_config,
        text_config=teacher.config.text_config,
        image_token_index=teacher.config.image_token_id,
        image_seq_length=teacher.config.image_seq_length,
        vision_feature_layer=teacher.config.vision_feature_layer,
        vision_feature_select_strategy=teacher.config.vision_feature_select_strategy,
    )
    stock = LlavaForConditionalGeneration(config)
    stock.load_state_dict(teacher.state_dict())
    trainer = trainer_of(student, stock)
    expected = explicit_gradients(student, teacher, batch_of(trainer, range(4)))
    assert_gradients_close(raw_gradients(trainer), expected)


PLAIN = {"temperature": 2.0, "kl_weight": 1.0, "lm_weight": 0.5}  # the other processes' arguments


@pytest.fixture
def saved(models, processor, tmp_path):
    """A folder with `student/`, `teacher/`, and `other/`, a teacher that sees an image as 4 tokens."""
    student, teacher = models()
    other, other_processor = smaller_images(teacher, processor)
    for name, model, own in (
        ("student", student, processor), ("teacher", teacher, processor), ("other", other, other_processor)
    ):  # fmt: skip
        model.save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.slow
def test_two_processes_move_the_biases_of_routers_as_one_does(models, trainer_of, saved):
    found = gradients_of_two_processes(saved, modes=["balance"])["balance"]
    trainer = trainer_of(*models(), **PLAIN, router_bias_update=0.25, train_modules=["adaptor"])
    trainer.train()
    for ours, theirs in zip(router_biases(trainer.model), found, strict=True):
        assert ours.any() and torch.equal(ours, theirs)


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(models, trainer_of, processor, saved):
    found = gradients_of_two_processes(saved, modes=["plain", "other", "text", "adaptor", "eval", "fsdp2"])

    student, teacher = models()
    trainer = trainer_of(student, teacher, **PLAIN)
    halves = [batch_of(trainer, indices) for indices in ((0, 1), (2, 3))]
    expected_aux = aux_gradients(student, teacher, halves)
    tokens, kl = 0, 0.0
    for half in halves:
        half_kl, _, half_tokens, _ = explicit_terms(student, teacher, half)
        tokens, kl = tokens + half_tokens, kl + half_kl.item()
    one = raw_gradients(trainer)
    assert_gradients_close(found[0.0], one)
    assert_gradients_close(found["fsdp2"], one)
    # each process has its half of the rows: the router aux is the mean of theirs
    assert_gradients_close(differences(found[1.0], found[0.0], expected_aux.keys()), expected_aux)
    assert found["log 0.0"]["kl"] == pytest.approx(kl / tokens, rel=1e-5)
    assert found["log 0.0"]["loss"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-5)
    balanced = trainer_of(*models(), **{**PLAIN, "router_aux_loss_coef": 1.0})
    balanced.train()
    figures = {name: value for name, value in balanced.state.log_history[0].items() if name.startswith("router/")}
    assert len(figures) == 5
    for name, value in figures.items():
        assert found["log 1.0"][name] == pytest.approx(value, rel=1e-5), name

    student, teacher = models()
    other, other_processor = smaller_images(teacher, processor)
    one = trainer_of(student, other, teacher_processor=other_processor, **PLAIN)
    assert_gradients_close(found["other"], raw_gradients(one))
    student, teacher = models()
    one = trainer_of(student, teacher, dataset=text_rows(), **PLAIN)
    assert_gradients_close(found["text"], raw_gradients(one))
    student, teacher = models()
    one = trainer_of(student, teacher, dataset=half_text_rows(), train_modules=["adaptor"], **PLAIN)
    assert_gradients_close(found["adaptor"], raw_gradients(one))
    assert_evaluation_counts_each_row_once(found["eval"], models, trainer_of, processor)


def assert_evaluation_counts_each_row_once(found, models, trainer_of, processor):
    student, teacher = models()
    other, other_processor = smaller_images(teacher, processor)
    options = {"per_device_eval_batch_size": 2, "router_aux_loss_coef": 0.1, **PLAIN}
    one = trainer_of(student, other, teacher_processor=other_processor, **options)
    one.args.eval_answers = 3
    for metrics, count in zip(found, EVALUATED, strict=True):
        expected = one.evaluate(rows(count=count))
        for name in (
            "eval_loss",
            "eval_kl",
            "eval_lm_loss",
            "eval_mean_token_accuracy",
            "eval_entropy",
            "eval_exact_match",
        ):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-5), (name, count)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2)])
def test_router_aux_is_counted_once_per_step(models, trainer_of, batch, accumulation):
    coef = 3.0
    found = {}
    for value in (0.0, coef):
        student, teacher = models()
        trainer = trainer_of(student, teacher, batch=batch, accumulation=accumulation, router_aux_loss_coef=value)
        batches = [batch_of(trainer, range(start, start + batch)) for start in range(0, 4, batch)]
        expected = {name: coef * g for name, g in aux_gradients(student, teacher, batches).items()}
        whole = aux_gradients(student, teacher, [batch_of(trainer, range(4))])
        found[value] = raw_gradients(trainer)
    assert_gradients_close(differences(found[coef], found[0.0], expected.keys()), expected)
    if accumulation > 1:
        # shares of first choices times mean probabilities: not linear, so the mean over parts is not the whole's
        name = max(whole, key=lambda n: whole[n].abs().max())
        assert not torch.allclose(expected[name], coef * whole[name], rtol=1e-2)


@pytest.mark.parametrize("aux_coef", [0.0, 0.1])
def test_router_z_loss_is_trained_and_logged_without_an_aux_too(models, trainer_of, aux_coef):
    coef, found, logs = 0.5, {}, {}
    for value in (0.0, coef):
        student, teacher = models()
        student.config.router_z_loss_coef = value
        trainer = trainer_of(student, teacher, batch=2, accumulation=2, router_aux_loss_coef=aux_coef)
        expected = 0.0
        for indices in ((0, 1), (2, 3)):
            inputs = {name: x for name, x in batch_of(trainer, indices).items() if name != "labels"}
            layers = student(**inputs, output_router_logits=True).router_logits
            real = inputs["attention_mask"].flatten().bool()
            expected += sum(logits[real].logsumexp(-1).square().mean() for logits in layers) / 2
        z_loss = expected.item()
        expected = gradients_of(student, coef * expected)
        found[value] = raw_gradients(trainer)
        logs[value] = trainer.state.log_history[0]
    assert_gradients_close(differences(found[coef], found[0.0], expected.keys()), expected)
    assert logs[coef]["z_loss"] == pytest.approx(z_loss, rel=1e-4)
    assert logs[coef]["loss"] - logs[0.0]["loss"] == pytest.approx(coef * z_loss, rel=1e-3)


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_logged_values_are_those_of_all_tokens_since_the_last_log(models, trainer_of, logging_steps):
    student, teacher = models()
    trainer = trainer_of(
        student,
        teacher,
        dataset=rows(count=8),
        batch=2,
        accumulation=2,
        max_steps=2,
        logging_steps=logging_steps,
        learning_rate=0.0,
        router_aux_loss_coef=0.1,
    )
    with torch.no_grad():
        batches = [batch_of(trainer, (start, start + 1)) for start in (0, 2, 4, 6)]
        terms = [[float(term) for term in explicit_terms(student, teacher, batch)] for batch in batches]
    assert len({tokens for _, _, tokens, _ in terms}) > 1, "the micro-batches need unequal token counts"
    trainer.train()

    logged = [logs for logs in trainer.state.log_history if "loss" in logs]
    count = 2 * logging_steps  # micro-batches of a window
    assert len(logged) == len(terms) // count
    for window, logs in enumerate(logged):
        kl, lm, tokens, aux = (sum(column) for column in zip(*terms[count * window :][:count], strict=True))
        assert logs["kl"] == pytest.approx(kl / tokens, rel=1e-5)
        assert logs["lm_loss"] == pytest.approx(lm / tokens, rel=1e-5)
        assert logs["aux_loss"] == pytest.approx(aux / count, rel=1e-5)
        expected = KL_WEIGHT * kl / tokens + LM_WEIGHT * lm / tokens + 0.1 * aux / count
        assert logs["loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_logs_under_its_own_names(models, trainer_of):
    student, teacher = models()
    trainer = trainer_of(student, teacher, per_device_eval_batch_size=2)
    metrics = trainer.evaluate(rows())
    logs = trainer.state.log_history[-1]
    with torch.no_grad():
        kl, lm, tokens, _ = explicit_terms(student, teacher, batch_of(trainer, range(4)))
    assert logs["eval_kl"] == pytest.approx(kl.item() / tokens, rel=1e-5)
    assert logs["eval_lm_loss"] == pytest.approx(lm.item() / tokens, rel=1e-5)
    assert "kl" not in logs
    assert "eval_loss" in metrics


@pytest.fixture
def rows_seen(monkeypatch):
    """What each call of the chunked loss was given: rows, and the options."""
    calls = []

    def spy(hidden, **options):
        calls.append({"hidden": hidden.detach(), **options})
        return chunked_mimic_loss(hidden, **options)

    monkeypatch.setattr(mimic_trainer_module, "chunked_mimic_loss", spy)
    return calls


def test_only_supervised_positions_are_projected(models, trainer_of, rows_seen):
    student, teacher = models()
    trainer = trainer_of(student, teacher, learning_rate=0.0, rows_per_chunk=5)
    batch = batch_of(trainer, range(4))
    labels = batch.pop("labels")
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != -100
    with torch.no_grad():
        expected = [model.model(**batch).last_hidden_state[keep] for model in (student, teacher)]
    trainer.train()
    (call,) = rows_seen
    assert call["rows_per_chunk"] == 5
    (teacher_rows,) = call["teachers"]
    for found, hidden_states in zip((call["hidden"], teacher_rows.hidden), expected, strict=True):
        torch.testing.assert_close(found, hidden_states, rtol=1e-4, atol=1e-5)
    assert teacher_rows.aligned is None


def test_teacher_is_not_trained(models, trainer_of):
    student, teacher = models()
    before = copy.deepcopy(teacher.state_dict())
    trainer_of(student, teacher, learning_rate=0.1, max_steps=2).train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training


def test_without_kl_no_teacher_is_needed(models, trainer_of):
    student, _ = models()
    trainer = trainer_of(student, None, kl_weight=0.0, temperature=1.0)
    trainer.train()
    assert "kl" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(LM_WEIGHT * trainer.state.log_history[0]["lm_loss"])


def test_a_batch_without_supervised_tokens_changes_nothing(models, trainer_of):
    student, teacher = models()
    trainer = trainer_of(student, teacher)
    batch = batch_of(trainer, range(2))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = trainer.compute_loss(student, batch)
    assert loss.item() == 0
    loss.backward()
    assert all((p.grad == 0).all() for p in student.parameters() if p.grad is not None)
