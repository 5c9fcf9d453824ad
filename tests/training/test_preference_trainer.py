"""The preference trainer: losses and raw gradients against the formulas on full logits, and against TRL's trainer."""

import copy
import inspect
import re

import pytest
import torch
from peft import LoraConfig
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from helpers import ddp_preference
from helpers.ddp_gradients import assert_gradients_close, gradients_of_two_processes, raw_gradients, rows
from helpers.preference_trainer_cases import PAIRS, batch_of, small_image_teacher, with_reference
from helpers.preference_trainers import BETA, explicit_loss, log_probabilities, uneven
from llava_mod_hf.losses import preference_losses
from llava_mod_hf.teachers.reference_model import REFERENCE_COLUMNS, TAIL_COLUMNS
from llava_mod_hf.training.preference_config import PARENT_LOSSES, SMOOTHED_LOSSES


def gradients(loss, model):
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ["sigmoid", "margin"])
@pytest.mark.parametrize("moe_layers", [(), (0, 2)], ids=["dense", "sparse"])
def test_loss_and_gradients_are_the_formulas_for_every_split(models, pair_trainer_of, moe_layers, name):
    expected = None
    for batch, accumulation in ((4, 1), (1, 4)):
        student, teacher = models(moe_layers)
        trainer = pair_trainer_of(student, teacher, batch=batch, accumulation=accumulation, loss_type=[name])
        if expected is None:
            loss = explicit_loss(name, student, teacher, batch_of(trainer))
            assert loss.item() > 0.01 and abs(loss.item() - 0.6931) > 0.01, "as much as without any preference"
            expected = gradients(loss, student)
        found = raw_gradients(trainer)
        assert_gradients_close(found, expected)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["kto_pair", "kto_pair_norm", "margin_norm", "sigmoid_norm"])
def test_other_losses_are_their_formulas(models, pair_trainer_of, name):
    student, teacher = models(())
    trainer = pair_trainer_of(student, teacher, loss_type=[name])
    loss = explicit_loss(name, student, teacher, batch_of(trainer))
    expected = gradients(loss, student)
    assert_gradients_close(raw_gradients(trainer), expected)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_margins_are_of_what_the_loss_weighs(models, pair_trainer_of):
    """With `ld_alpha` the tokens past the shorter response of a pair count less, for the student and the reference."""
    student, teacher = models(())
    trainer = pair_trainer_of(student, teacher, ld_alpha=0.25, dataset=uneven(rows("preferences")))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["margins/student"] == pytest.approx(log["logps/chosen"] - log["logps/rejected"], rel=1e-5)
    assert log["margins/student"] - log["margins/teacher"] == pytest.approx(log["rewards/margins"] / BETA, rel=1e-4)
    plain, _ = log_probabilities(student, batch_of(trainer))
    assert abs(log["margins/student"] - (plain[:PAIRS] - plain[PAIRS:]).mean().item()) > 0.01


def test_computed_references_without_tails_are_refused_with_ld_alpha(models, pair_trainer_of):
    student, teacher = models(())
    dataset = with_reference(rows("preferences"), teacher, pair_trainer_of(student, teacher))
    with pytest.raises(ValueError, match=f"`ld_alpha` is 0.5, .* need the columns {', '.join(TAIL_COLUMNS)}"):
        pair_trainer_of(student, None, dataset=dataset, ld_alpha=0.5)
    for name in TAIL_COLUMNS:
        dataset = dataset.add_column(name, [-1.0] * PAIRS)
    trainer = pair_trainer_of(student, None, dataset=dataset, ld_alpha=0.5)
    trainer.train()
    plain = pair_trainer_of(student, None, dataset=dataset)
    plain.train()
    found, expected = (each.state.log_history[0]["margins/teacher"] for each in (trainer, plain))
    assert found == pytest.approx(expected, abs=1e-5), "the tails of both responses are alike"


def test_a_mixture_is_the_weighted_sum_of_ours_and_the_parents(models, pair_trainer_of):
    student, teacher = models(())
    weights = {"sigmoid": 0.5, "kto_pair": 2.0, "hinge": 0.25, "margin": 1.5}
    trainer = pair_trainer_of(student, teacher, loss_type=[*weights], loss_weights=[*weights.values()])
    batch = batch_of(trainer)
    loss = sum(weight * explicit_loss(name, student, teacher, batch) for name, weight in weights.items())
    expected = gradients(loss, student)
    assert_gradients_close(raw_gradients(trainer), expected)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_accumulation_changes_the_estimate_of_kto_pair(models, pair_trainer_of):
    """Each micro-batch has its own: the step's gradient is the mean of theirs, which is another than the whole's."""
    found = {}
    for batch, accumulation in ((4, 1), (2, 2)):
        student, teacher = models(())
        trainer = pair_trainer_of(student, teacher, batch=batch, accumulation=accumulation, loss_type=["kto_pair"])
        if batch == 2:
            parts = [batch_of(trainer, indices) for indices in ([0, 1], [2, 3])]
            loss = sum(explicit_loss("kto_pair", student, teacher, part) for part in parts) / 2
            expected = gradients(loss, student)
        found[batch] = raw_gradients(trainer)
    assert_gradients_close(found[2], expected)
    whole, split = (torch.cat([g.flatten() for g in found[batch].values()]) for batch in (4, 2))
    assert (whole - split).norm() > 0.01 * whole.norm()


def test_the_authors_kto_pair_is_another_gradient(models, pair_trainer_of):
    found = {}
    for compat in (False, True):
        student, teacher = models(())
        # as its own reference shifted: positive log-ratios, so that the estimates are not clamped away
        trainer = pair_trainer_of(student, teacher, loss_type=["kto_pair"], kto_reference_compat=compat, beta=0.01)
        policy, _ = log_probabilities(student, batch_of(trainer))
        shifted = rows("preferences").add_column(REFERENCE_COLUMNS[0], (policy[:4] - 1).tolist())
        shifted = shifted.add_column(REFERENCE_COLUMNS[1], (policy[4:] - torch.arange(4)).tolist())
        trainer = pair_trainer_of(
            student, None, dataset=shifted, loss_type=["kto_pair"], kto_reference_compat=compat, beta=0.5
        )
        found[compat] = raw_gradients(trainer)
        log = trainer.state.log_history[0]
        assert log["kto/kl_chosen"] == pytest.approx(1, abs=1e-4)
        assert log["kto/kl_rejected"] == pytest.approx(1.5, abs=1e-4)
        assert log["kto/clamped_chosen"] == log["kto/clamped_rejected"] == 0
        c, r = torch.ones(4), torch.arange(4.0)
        expected = preference_losses.kto_pair_loss(c, r, beta=0.5, reference_compat=compat).item()
        assert log["loss"] == pytest.approx(expected, abs=1e-5)
    ours, theirs = (torch.cat([g.flatten() for g in found[compat].values()]) for compat in (False, True))
    assert (ours - theirs).norm() > 0.1 * ours.norm()


def test_clamped_estimates_are_counted(models, pair_trainer_of):
    student, teacher = models(())
    trainer = pair_trainer_of(student, teacher, loss_type=["kto_pair"])
    policy, _ = log_probabilities(student, batch_of(trainer))
    # chosen: one of two micro-batches has a mean below 0; rejected: both
    shifts = torch.tensor([-1.0, -1, 1, 1]), torch.tensor([-1.0, -1, -1, 0.5])
    dataset = rows("preferences")
    for name, side, shift in zip(REFERENCE_COLUMNS, policy.chunk(2), shifts, strict=True):
        dataset = dataset.add_column(name, (side - shift).tolist())
    trainer = pair_trainer_of(student, None, dataset=dataset, loss_type=["kto_pair"], batch=2, accumulation=2)
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["kto/clamped_chosen"], log["kto/clamped_rejected"]) == (0.5, 1.0)
    assert log["kto/kl_chosen"] == pytest.approx(0.5, abs=1e-4) and log["kto/kl_rejected"] == 0


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["kto_pair"]])
def test_margins_are_logged_for_every_loss(models, pair_trainer_of, loss_type):
    student, teacher = models(())
    trainer = pair_trainer_of(student, teacher, loss_type=loss_type, batch=2, accumulation=2)
    margins = {}
    for name, model in (("student", student), ("teacher", teacher)):
        chosen, rejected = log_probabilities(model, batch_of(trainer))[0].chunk(2)
        margins[name] = chosen - rejected
    below = sum(s < t for s, t in zip(margins["student"].tolist(), margins["teacher"].tolist(), strict=True)) / PAIRS
    assert 0 < below < 1
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["margins/below"] == pytest.approx(below)
    for name, values in margins.items():
        assert log[f"margins/{name}"] == pytest.approx(values.mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("moe_layers", "args"),
    [
        ((), {"loss_type": ["sigmoid"]}),
        (
            (0, 2),
            {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [1.0, 0.5, 0.1], "router_aux_loss_coef": 0.1},
        ),
    ],
    ids=["sigmoid", "mixture with pooled router aux"],
)
def test_live_and_precomputed_are_trls_own(models, pair_trainer_of, moe_layers, args):
    def run(kind):
        student, teacher = models(moe_layers)
        student.config.router_aux_loss_type = "pooled"  # the only form that TRL has
        if kind == "trl":
            trainer = pair_trainer_of(student, teacher, trainer=DPOTrainer, **args)
        else:
            trainer = pair_trainer_of(student, teacher, **args)
        if kind == "precomputed":
            rows_with = with_reference(trainer.train_dataset, teacher, trainer)
            trainer = pair_trainer_of(student, None, dataset=rows_with, **args)
            assert trainer.ref_model is None
        return raw_gradients(trainer), trainer.state.log_history[0]

    expected, expected_log = run("trl")
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for kind in ("live", "precomputed"):
        found, log = run(kind)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * max(1, largest))
        shared = [name for name in expected_log if name.startswith(("loss", "rewards/", "logps/", "aux"))]
        assert {"loss", "rewards/margins", "rewards/accuracies", "logps/chosen"} <= {*shared}
        for name in shared:
            assert log[name] == pytest.approx(expected_log[name], abs=1e-6 * max(1, abs(expected_log[name]))), name


def test_what_is_relied_on_in_trl():
    assert str(inspect.signature(DPOTrainer._compute_loss)) == "(self, model, inputs, return_outputs)"
    assert str(inspect.signature(DPOTrainer.compute_ref_log_probs)) == "(self, model, inputs)"
    assert [*inspect.signature(DPOTrainer.__init__).parameters][:4] == ["self", "model", "ref_model", "args"]
    source = inspect.getsource(DPOTrainer._compute_loss)
    # the reference comes with the batch, the outputs from the model that is passed
    assert source.count("self.precompute_ref_logps") == 1
    assert 'inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]' in source
    assert '_non_model_keys = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}' in source
    calls = re.findall(r"(?<![\w.])model\(.*\)", source)
    assert calls == ["model(**model_kwargs, labels=labels, fused_lm_head=True)", "model(**model_kwargs)"]
    assert "zip(self.loss_types, self.loss_weights, strict=True)" in source
    assert "aux_loss = outputs.aux_loss" in source
    # its losses, and those that read the label smoothing
    branches = re.split(r'if loss_type == "(\w+)":', source)[1:]
    bodies = dict(zip(branches[::2], branches[1::2], strict=True))
    assert set(bodies) == set(PARENT_LOSSES)
    assert {name for name, body in bodies.items() if "label_smoothing" in body} == SMOOTHED_LOSSES
    # its collator for images drops the reference's columns, and it would load a reference that nobody gave
    collator = inspect.getsource(dpo_trainer.DataCollatorForVisionPreference.torch_call)
    assert "ref_chosen_logps" not in collator
    assert "ref_chosen_logps" not in inspect.getsource(DPOTrainer._set_signature_columns_if_needed).split("else:")[0]
    assert "create_model_from_path(ref_model_path" in inspect.getsource(DPOTrainer.__init__)


def test_the_student_as_it_was_is_a_reference(models, pair_trainer_of):
    student, _ = models(())
    start = copy.deepcopy(student)
    trainer = pair_trainer_of(student, None, reference="self", learning_rate=0.01, max_steps=2)
    found = raw_gradients(trainer)
    first, second, *_ = trainer.state.log_history
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert first["margins/student"] == pytest.approx(first["margins/teacher"], abs=1e-5)
    expected = gradients(explicit_loss("sigmoid", start, copy.deepcopy(start), batch_of(trainer)), start)
    assert_gradients_close(found, expected)
    assert second["margins/teacher"] == pytest.approx(first["margins/teacher"], abs=1e-4), "the reference has moved"
    assert abs(second["margins/student"] - first["margins/student"]) > 0.01


def test_teacher_is_not_trained(models, pair_trainer_of):
    student, teacher = models()
    before, start = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    pair_trainer_of(student, teacher, learning_rate=0.01).train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not all(torch.equal(value, start[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("name", ["sigmoid", "margin_norm"])
def test_a_teacher_reads_the_pairs_through_its_own_processor(models, pair_trainer_of, other_processor, name):
    student, teacher = models(())
    teacher = small_image_teacher(teacher)
    trainer = pair_trainer_of(
        student, teacher, teacher_processor=other_processor, loss_type=[name], batch=2, accumulation=2
    )
    batch = batch_of(trainer)
    theirs = batch["reference_inputs"]
    assert batch["pixel_values"].shape[-1] == 64 and theirs["pixel_values"].shape[-1] == 32
    assert "ASSISTANT: " in other_processor.tokenizer.decode(theirs["input_ids"][0])
    loss = explicit_loss(name, student, teacher, batch, theirs)
    expected = gradients(loss, student)
    assert_gradients_close(raw_gradients(trainer), expected)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_teacher_may_be_in_bfloat16(models, pair_trainer_of):
    student, teacher = models(())
    log = {}
    for dtype in (torch.float32, torch.bfloat16):
        trainer = pair_trainer_of(copy.deepcopy(student), copy.deepcopy(teacher).to(dtype))
        trainer.train()
        log[dtype] = trainer.state.log_history[0]["margins/teacher"]
    assert log[torch.float32] != log[torch.bfloat16]
    assert log[torch.float32] == pytest.approx(log[torch.bfloat16], rel=0.1, abs=1)


def test_evaluation_has_the_same_figures(models, pair_trainer_of):
    student, teacher = models(())
    trainer = pair_trainer_of(student, teacher, loss_type=["margin"], eval_dataset=rows("preferences"))
    loss = explicit_loss("margin", student, teacher, batch_of(trainer))
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert {"eval_margins/student", "eval_margins/teacher", "eval_margins/below"} <= found.keys()
    assert not trainer.precompute_ref_logps, "the next evaluation of text rows would compute them anew"


@pytest.mark.parametrize("kind", ["switch", "pooled"])
def test_router_aux_of_both_halves_is_added_once_in_the_form_that_the_config_names(models, pair_trainer_of, kind):
    logs = {}
    for coef in (0.0, 1.0):
        student, teacher = models()
        student.config.router_aux_loss_type = kind
        trainer = pair_trainer_of(student, teacher, router_aux_loss_coef=coef)
        inputs = {name: x for name, x in batch_of(trainer).items() if name != "completion_mask"}
        with torch.no_grad():
            router_logits = student(**inputs, output_router_logits=True).router_logits
        trainer.train()
        logs[coef] = trainer.state.log_history[0]
    assert logs[1.0]["loss"] - logs[0.0]["loss"] == pytest.approx(logs[1.0]["aux_loss"], rel=1e-4)
    assert len(router_logits) == 2 and len(router_logits[0]) == 2 * PAIRS * inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].reshape(-1).bool()
    layers = [logits[real].double().softmax(-1) for logits in router_logits]
    if kind == "switch":
        chosen = [torch.nn.functional.one_hot(p.argmax(-1), 4).double().mean(0) for p in layers]
        expected = sum(4 * (f * p.mean(0)).sum() for f, p in zip(chosen, layers, strict=True))
    else:
        pooled = torch.cat(layers)
        chosen = torch.nn.functional.one_hot(pooled.topk(2).indices, 4).double().mean(0)
        expected = 4 * (chosen * pooled.mean(0)).sum()
    assert logs[1.0]["aux_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_router_z_loss_is_added(models, pair_trainer_of):
    logs = {}
    for coef in (0.0, 0.5):
        student, teacher = models()
        student.config.router_z_loss_coef = coef
        trainer = pair_trainer_of(student, teacher)
        trainer.train()
        logs[coef] = trainer.state.log_history[0]
    assert logs[0.5]["router_z_loss"] > 0.1 and "router_z_loss" not in logs[0.0]
    assert logs[0.5]["loss"] - logs[0.0]["loss"] == pytest.approx(0.5 * logs[0.5]["router_z_loss"], rel=1e-3)


def test_gradient_checkpointing_changes_nothing(models, pair_trainer_of):
    found = []
    for checkpointing in (False, True):
        trainer = pair_trainer_of(
            *models(), gradient_checkpointing=checkpointing, router_aux_loss_coef=0.1, loss_type=["kto_pair"]
        )
        found.append(raw_gradients(trainer))
    assert_gradients_close(found[1], found[0])


@pytest.mark.parametrize("reference", ["teacher", "self"])
def test_lora(models, pair_trainer_of, reference):
    student, teacher = models(())
    before = copy.deepcopy(student)
    lora = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    trainer = pair_trainer_of(
        student,
        teacher if reference == "teacher" else None,
        reference=reference,
        peft_config=lora,
        loss_type=["margin"],
    )
    adapted = trainer.model
    batch = batch_of(trainer)
    loss = explicit_loss("margin", adapted, teacher if reference == "teacher" else before, batch)
    assert loss.item() > 0
    found = raw_gradients(trainer)
    assert found and all("lora_" in name for name in found)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(models, pair_trainer_of, processor, tmp_path):
    student, teacher = models(())
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
    processor.save_pretrained(tmp_path / "student")
    found = gradients_of_two_processes(tmp_path, ddp_preference.__file__)
    logs = {}
    for name in ("sigmoid", "margin", "kto_pair"):
        trainer = pair_trainer_of(copy.deepcopy(student), copy.deepcopy(teacher), loss_type=[name])
        assert_gradients_close(found[name], raw_gradients(trainer))
        logs[name] = trainer.state.log_history[0]
        for figure in ("loss", "margins/student", "margins/teacher", "margins/below"):
            assert found[f"log {name}"][figure] == pytest.approx(logs[name][figure], rel=1e-4), (name, figure)
    for figure in ("kto/kl_chosen", "kto/kl_rejected", "kto/clamped_chosen", "kto/clamped_rejected"):
        assert found["log kto_pair"][figure] == pytest.approx(logs["kto_pair"][figure], abs=1e-3)
    # the authors' estimates are each process's own
    ours, theirs = (torch.cat([g.flatten() for g in found[name].values()]) for name in ("kto_pair", "authors"))
    assert (ours - theirs).norm() > 0.01 * ours.norm()
