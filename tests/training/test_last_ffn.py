"""Trainers whose student and teacher run their last FFN where a token is supervised."""

from helpers.ddp_gradients import raw_gradients
from helpers.positions import positions_seen
from helpers.preference_trainer_cases import PAIRS
from llava_mod_hf.losses.rows import shift_for_next_token


def seen_of_both(student, teacher, step):
    (_, of_teacher), of_student = positions_seen(student, lambda: positions_seen(teacher, step))
    return of_student, of_teacher


def test_a_mimic_step(make_student, trainer_of):
    student, teacher = make_student(moe_layers=[0], seed=0), make_student(moe_layers=[], seed=1)
    trainer = trainer_of(student, teacher, batch=4)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    supervised = shift_for_next_token(batch["labels"])[0].sum().item()
    assert seen_of_both(student, teacher, lambda: raw_gradients(trainer)) == ([supervised], [supervised])
    assert 0 < supervised < batch["labels"].numel()


def test_a_preference_step(make_student, pair_trainer_of):
    student, teacher = make_student(moe_layers=[0], seed=0), make_student(moe_layers=[], seed=1)
    trainer = pair_trainer_of(student, teacher)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(PAIRS)])
    # the last token of a prompt predicts the first one of both responses
    supervised = batch["completion_mask"].sum().item() - PAIRS
    assert seen_of_both(student, teacher, lambda: raw_gradients(trainer)) == ([supervised], [supervised])
