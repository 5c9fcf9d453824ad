"""What the trainers log: TRL's own measures by TRL's definitions, whatever a callback logs in between."""

import pytest
import torch
from transformers import TrainerCallback

from helpers.ddp_gradients import mimic_trainer, rows, sharpened
from helpers.trainers import TRAINERS
from llava_mod_hf.training.logs import kind_of_logs

STEPS = {"batch": 2, "max_steps": 2, "logging_steps": 2, "learning_rate": 0.0}


@pytest.fixture
def logged(make_student, processor, tmp_path):
    """`logged(name, callback=None, **options)`: what a run of two steps logs at its end."""

    def run(name, callback=None, **args):
        student, teacher = (sharpened(make_student(moe_layers=[], seed=seed)) for seed in (0, 1))
        callbacks = [] if callback is None else [callback]
        trainer = TRAINERS[name](student, teacher, processor, tmp_path, callbacks=callbacks, **{**STEPS, **args})
        if callback is not None:
            callback.trainer = trainer
        trainer.train()
        return next(logs for logs in trainer.state.log_history if "loss" in logs)

    return run


class LogsItself(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.log({"own": 1.0})


@pytest.mark.parametrize("name", TRAINERS)
def test_a_callbacks_own_logs_change_nothing_of_the_trainers(logged, name):
    plain, found = logged(name), logged(name, LogsItself())
    changing = ("runtime", "per_second")
    assert found.keys() == plain.keys()
    for key, value in plain.items():
        if not key.endswith(changing):
            assert found[key] == pytest.approx(value, rel=1e-6), key


def test_a_callbacks_logs_hold_what_it_logged_alone(make_student, processor, tmp_path):
    callback = LogsItself()
    student, teacher = (make_student(moe_layers=[], seed=seed) for seed in (0, 1))
    callback.trainer = mimic_trainer(student, teacher, processor, tmp_path, callbacks=[callback], **STEPS)
    callback.trainer.train()
    own = [logs for logs in callback.trainer.state.log_history if "own" in logs]
    assert [logs.keys() for logs in own] == [{"own", "epoch", "step"}] * 2


def test_tokens_and_entropy_are_those_of_trls_trainer(logged):
    own, trls = (logged(name, batch=4, max_steps=1, logging_steps=1) for name in ("mimic", "adapt"))
    assert own["num_tokens"] == trls["num_tokens"] > 0
    for name in ("entropy", "mean_token_accuracy"):
        assert own[name] == pytest.approx(trls[name], rel=1e-5), name
    whole = logged("mimic")  # two steps of half the rows
    assert whole["num_tokens"] == own["num_tokens"]
    assert whole["entropy"] == pytest.approx(own["entropy"], rel=1e-5)


def test_preference_logs_count_tokens_and_entropy(logged):
    logs = logged("prefer")
    assert logs["num_tokens"] > 0
    assert logs["entropy"] > 0


@pytest.mark.parametrize(
    ("logs", "kind"),
    [
        ({"loss": 1.0, "grad_norm": 2.0}, ("train", "")),
        ({"train_loss": 1.0, "train_runtime": 2.0}, ("train", "")),
        ({"eval_loss": 1.0, "eval_runtime": 2.0}, ("eval", "eval_")),
        ({"eval_test_loss": 1.0}, ("eval", "eval_test_")),
        ({"own": 1.0}, None),
    ],
)
def test_the_kind_of_logs_is_told_by_the_loss_that_they_hold(logs, kind):
    assert kind_of_logs(logs) == kind


def test_the_share_that_a_teacher_says_nothing_about_is_logged(make_student, make_teacher, processor, tmp_path):
    student = sharpened(make_student(moe_layers=[]))
    teacher, own = make_teacher()  # of another end of turn: one token of each of four answers
    trainer = mimic_trainer(student, teacher, processor, tmp_path, teacher_processor=own)
    labels = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])["labels"]
    trainer.train()
    assert trainer.state.log_history[0]["unaligned"] == pytest.approx(4 / (labels != -100).sum().item())


def test_several_sets_of_evaluation_have_their_own_names(make_student, processor, tmp_path):
    student, teacher = (sharpened(make_student(moe_layers=[], seed=seed)) for seed in (0, 1))
    trainer = mimic_trainer(student, teacher, processor, tmp_path)
    metrics = trainer.evaluate({"one": rows(count=2), "two": rows(count=6).select(range(4, 6))})
    assert metrics["eval_one_kl"] != metrics["eval_two_kl"]
    assert metrics["eval_one_loss"] == pytest.approx(metrics["eval_one_kl"] + 0.5 * metrics["eval_one_lm_loss"])
    with torch.no_grad():
        alone = trainer.evaluate(rows(count=2))
    assert alone["eval_loss"] == pytest.approx(metrics["eval_one_loss"])
