"""Teachers of the mimic trainer: several, with a processor of their own, broken ones; and rows that teach nothing."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from helpers.ddp_gradients import assert_gradients_close, mimic_trainer, raw_gradients, rows, sharpened, smaller_images
from llava_mod_hf.losses.divergences import divergence_rows
from llava_mod_hf.losses.rows import shift_for_next_token
from llava_mod_hf.training import mimic_trainer as mimic_trainer_module
from llava_mod_hf.training.trainable import set_trainable

TERMS = {"temperature": 2.0, "kl_weight": 0.7, "lm_weight": 0.5}


@pytest.fixture
def student(make_student):
    return sharpened(make_student(moe_layers=(0, 2), seed=0))


@pytest.fixture
def trainer_of(student, processor, tmp_path):
    return lambda teacher, **args: mimic_trainer(
        copy.deepcopy(student), teacher, processor, tmp_path, **{**TERMS, **args}
    )


@pytest.fixture
def small_teacher(make_student, processor):
    """A teacher that sees an image as 4 tokens instead of 16, and its processor."""
    return smaller_images(make_student(moe_layers=[], seed=1), processor)


def hidden_rows(model, trainer, processor=None):
    """Logits at the positions that predict a response token, in order, read through a processor."""
    collator = getattr(trainer.data_collator, "collator", trainer.data_collator)
    collator = copy.copy(collator)
    collator.processor = processor or collator.processor
    batch = collator([trainer.train_dataset[i] for i in range(4)])
    keep, targets = shift_for_next_token(batch.pop("labels"))
    return model(**batch).logits[keep], targets


def explicit_gradients(student, trainer, teachers, **options):
    """Of the trainer's terms with `(weight, teacher, processor)`s, from logits of all positions."""
    student = copy.deepcopy(student)
    logits, targets = hidden_rows(student, trainer)
    loss = TERMS["lm_weight"] * F.cross_entropy(logits, targets)
    for weight, teacher, processor in teachers:
        with torch.no_grad():
            teacher_logits, _ = hidden_rows(teacher, trainer, processor)
        divergence = divergence_rows(logits, teacher_logits, temperature=TERMS["temperature"], **options)
        loss = loss + TERMS["kl_weight"] * weight * divergence.mean()
    loss.backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_the_divergence_is_the_chosen_one(student, make_student, trainer_of, divergence):
    teacher = sharpened(make_student(moe_layers=[], seed=1))
    options = {"divergence": divergence, **({"jsd_beta": 0.2} if divergence == "jsd" else {})}
    trainer = trainer_of(teacher, **options)
    expected = explicit_gradients(student, trainer, [(1.0, teacher, None)], **options)
    assert_gradients_close(raw_gradients(trainer), expected)
    assert trainer.state.log_history[0]["kl"] > 0


def test_a_teacher_reads_the_rows_through_its_own_processor(student, small_teacher, trainer_of):
    teacher, own = small_teacher
    expected = None
    for batch, accumulation in ((4, 1), (2, 2)):
        trainer = trainer_of(teacher, teacher_processor=own, batch=batch, accumulation=accumulation)
        if expected is None:
            expected = explicit_gradients(student, trainer, [(1.0, teacher, own)])
        assert_gradients_close(raw_gradients(trainer), expected)


@pytest.mark.parametrize("weights", [None, [0.9, 0.4]])
def test_several_teachers_are_weighted(student, make_student, small_teacher, trainer_of, weights):
    first = sharpened(make_student(moe_layers=[], seed=1))
    second, own = small_teacher
    trainer = trainer_of([first, second], teacher_processor=[None, own], teacher_weights=weights)
    one, two = weights or [0.5, 0.5]
    expected = explicit_gradients(student, trainer, [(one, first, None), (two, second, own)])
    assert_gradients_close(raw_gradients(trainer), expected)
    logs = trainer.state.log_history[0]
    assert logs["kl"] == pytest.approx(one * logs["kl_teacher_0"] + two * logs["kl_teacher_1"], rel=1e-5)
    assert logs["loss"] == pytest.approx(0.7 * logs["kl"] + 0.5 * logs["lm_loss"], rel=1e-5)


def test_numbers_of_weights_and_processors_that_do_not_fit_are_refused(make_student, trainer_of, processor):
    teacher = make_student(moe_layers=[], seed=1)
    with pytest.raises(ValueError, match=r"`teacher_weights` is \[0.5, 0.5\]: give a list of 1 numbers"):
        trainer_of(teacher, teacher_weights=[0.5, 0.5])
    with pytest.raises(ValueError, match="1 teachers and 2 `teacher_processor`s"):
        trainer_of([teacher], teacher_processor=[processor, processor])


@pytest.mark.parametrize("part", ["model.language_model.norm.weight", "lm_head.weight"])
def test_a_teacher_that_returns_nan_is_refused_at_the_first_step(make_student, trainer_of, part):
    teacher = make_student(moe_layers=[], seed=1)
    teacher.config.name_or_path = "some/teacher"
    teacher.name_or_path = "some/teacher"
    broken = trainer_of([make_student(moe_layers=[], seed=2), teacher])
    teacher.lm_head.weight = torch.nn.Parameter(teacher.lm_head.weight.clone())  # not that of the embeddings too
    broken.teachers[1]._head = broken.teachers[1]._head._replace(weight=teacher.lm_head.weight)
    teacher.get_parameter(part).data[3] = torch.nan
    with pytest.raises(ValueError, match=r"Teacher 1 \(`some/teacher`\)"):
        broken.train()
    assert broken.state.global_step == 0


def test_a_student_that_returns_nan_is_not_blamed_on_the_teacher(make_student, trainer_of):
    trainer = trainer_of(make_student(moe_layers=[], seed=1))
    trainer.model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="stopped at step 1: trained weights held values that are not finite"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_rows_without_response_tokens_are_counted_and_reported_once(make_student, trainer_of, caplog):
    trainer = trainer_of(make_student(moe_layers=[], seed=1), batch=2, accumulation=2)
    collator = trainer.data_collator

    def empty_first(examples):
        batch = collator(examples)
        batch["labels"][0] = -100
        return batch

    trainer.data_collator = empty_first
    with caplog.at_level(logging.WARNING, logger=mimic_trainer_module.__name__):
        trainer.train()
    assert trainer.state.log_history[0]["rows_without_tokens"] == 2
    (record,) = [record for record in caplog.records if record.name == mimic_trainer_module.__name__]
    assert "1 of 2 rows" in record.getMessage()


def test_a_run_without_such_rows_does_not_speak_of_them(make_student, trainer_of):
    trainer = trainer_of(make_student(moe_layers=[], seed=1))
    trainer.train()
    assert "rows_without_tokens" not in trainer.state.log_history[0]


@pytest.mark.parametrize("share", [True, False])
def test_the_vision_tower_runs_once_where_it_is_the_same_and_frozen(make_student, processor, tmp_path, share):
    gradients = []
    for option in (share, False):
        student, teacher = (sharpened(make_student(moe_layers=(0, 2), seed=0)) for _ in range(2))
        set_trainable(student, None)
        parts = teacher.state_dict().keys()
        trainer = mimic_trainer(student, teacher, processor, tmp_path, share_vision_tower=option)
        runs = []
        student.model.vision_tower.register_forward_hook(lambda *args, runs=runs: runs.append(1))
        if not option:
            teacher.model.vision_tower.register_forward_hook(lambda *args, runs=runs: runs.append(1))
        gradients.append(raw_gradients(trainer))
        assert len(runs) == (1 if option else 2)
        assert teacher.state_dict().keys() == parts, "the caller's teacher stays whole"
    assert_gradients_close(*gradients)


def test_under_bf16_autocast_both_models_run_in_bf16(make_student, processor, tmp_path, monkeypatch):
    seen = []
    plain = mimic_trainer_module.chunked_mimic_loss

    def spy(hidden, head, teachers, **options):
        seen.extend([torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), teachers[0].hidden.dtype])
        return plain(hidden, head, teachers=teachers, **options)

    monkeypatch.setattr(mimic_trainer_module, "chunked_mimic_loss", spy)
    student, teacher = (sharpened(make_student(moe_layers=[], seed=seed)) for seed in (0, 1))
    linear = []
    teacher.model.language_model.layers[0].mlp.register_forward_hook(lambda *args: linear.append(args[2].dtype))
    student.model.language_model.layers[0].mlp.register_forward_hook(lambda *args: linear.append(args[2].dtype))
    mimic_trainer(student, teacher, processor, tmp_path, bf16=True).train()
    assert seen[:2] == [True, torch.bfloat16]
    assert linear[-2:] == [torch.bfloat16, torch.bfloat16]


def test_an_adapter_is_trained(make_student, processor, tmp_path):
    student, teacher = (sharpened(make_student(moe_layers=[], seed=seed)) for seed in (0, 1))
    adapted = get_peft_model(student, LoraConfig(r=2, target_modules=".*language_model.*q_proj"))
    found = raw_gradients(mimic_trainer(adapted, teacher, processor, tmp_path, dataset=rows()))
    assert all("lora" in name for name in found)
    assert any((gradient != 0).any() for gradient in found.values())
