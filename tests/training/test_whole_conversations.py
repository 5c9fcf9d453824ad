"""Conversations in one pass: gradients, teachers and the student's own answers as with a row for each answer."""

import logging

import pytest
import torch

from helpers.ddp_gradients import RUN, mimic_trainer, raw_gradients, sharpened, smaller_images
from helpers.templates import (
    CONVERSATIONS,
    LATER,
    MESSAGES,
    PARTS,
    REWRITING,
    TEMPLATES,
    as_row,
    assistant,
    expanded,
    picture,
    rows_of,
    shown,
    templated,
    user,
)
from helpers.tiny import make_student as new_student
from llava_mod_hf.data.conversations import AnswersCollator
from llava_mod_hf.data.fitting import fit_rows
from llava_mod_hf.evaluation.answers import generate_answers, kl_to_teacher
from llava_mod_hf.training import on_policy
from llava_mod_hf.training.adapt_config import AdaptConfig
from llava_mod_hf.training.adapt_trainer import AdaptTrainer

WHOLE = rows_of([as_row(row) for row in CONVERSATIONS])
EACH = rows_of([each for row in CONVERSATIONS for each in expanded(row)])


def feature_of(rows):
    return MESSAGES if rows is CONVERSATIONS else PARTS


@pytest.fixture
def models(tokenizer):
    """`models(processor, moe_layers)`: student and teacher in float64 (but what the family itself does in float32)."""

    def make(processor, moe_layers=(0, 2)):
        student = sharpened(new_student(processor.tokenizer, moe_layers=moe_layers, seed=0)).double()
        student.set_experts_implementation("eager")  # grouped_mm knows no float64
        return student, sharpened(new_student(processor.tokenizer, moe_layers=(), seed=1)).double()

    return make


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert largest > 1e-3 and all(gradient.dtype == torch.float64 for gradient in found.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * largest.item(), msg=name)


@pytest.mark.parametrize("case", ["same teacher", "messages", "another template", "batches", "later pictures"])
def test_gradients_are_those_of_a_row_for_each_answer(tokenizer, models, tmp_path, case):
    processor = templated(tokenizer, "llama-3")
    rows, singles = rows_of(CONVERSATIONS) if case == "messages" else WHOLE, EACH
    if case == "later pictures":
        rows = rows_of([as_row(row) for row in LATER], PARTS)
        singles = rows_of([each for row in LATER for each in expanded(row)], PARTS)
    options = {"batch": 2, "accumulation": 2} if case == "batches" else {"batch": len(rows)}
    found, logs = [], []
    for each, sizes in ((rows, options), (singles, {"batch": len(singles)})):
        (student, teacher), own = models(processor), None
        if case in ("another template", "later pictures"):
            # a space before each answer, another end of turn, fewer tokens of a picture
            teacher, own = smaller_images(teacher, templated(tokenizer, "mistral"))
            teacher = teacher.double()
        trainer = mimic_trainer(
            student, teacher, processor, tmp_path, dataset=each, kl_weight=0.7, teacher_processor=own, **sizes
        )
        found.append(raw_gradients(trainer))
        logs.append(trainer.state.log_history[0])
    assert_same_gradients(*found)
    for name in ("loss", "kl", "lm_loss", *(("unaligned",) if own else ())):
        assert 0 < logs[0][name] == pytest.approx(logs[1][name], rel=1e-6), name


def test_adapt_has_the_same_gradients(tokenizer, models, tmp_path):
    processor = templated(tokenizer)
    found = []
    for rows in (WHOLE, EACH):
        student, _ = models(processor, moe_layers=())
        args = AdaptConfig(output_dir=str(tmp_path), per_device_train_batch_size=len(rows), **RUN)
        found.append(raw_gradients(AdaptTrainer(student, args, train_dataset=rows, processing_class=processor)))
    assert_same_gradients(*found)


THINKING = [user("what?"), assistant("<think>hm</think>red"), user("sure?"), assistant("yes")]


@pytest.mark.parametrize("fitted", [False, True])
def test_what_a_template_rewrites_is_a_row_for_each_answer_in_a_trainer_too(
    tokenizer, models, tmp_path, fitted, caplog
):
    processor = templated(tokenizer, REWRITING)
    rows = rows_of([as_row({"images": [picture()], "messages": THINKING}), as_row(CONVERSATIONS[2])])
    with caplog.at_level(logging.WARNING):
        given = fit_rows(rows, processor, max_length=None)[0] if fitted else rows
        student, teacher = models(processor, ())
        trainer = mimic_trainer(student, teacher, processor, tmp_path, dataset=given)
    assert [len(row["completion"]) for row in trainer.train_dataset] == [1, 1, 3]
    assert caplog.text.count("1 of 2 rows cannot be read in one pass") == 1
    trainer.eval_dataset = {"own": trainer._readable(rows)}
    assert len(trainer.eval_dataset["own"]) == 3


def test_a_teacher_whose_template_rewrites_history_or_answers_is_refused(tokenizer, models, tmp_path):
    processor = templated(tokenizer, "chatml")
    rows = rows_of([as_row({"images": [picture()], "messages": THINKING})])
    student, teacher = models(processor, ())
    told = (
        "Of the teacher's own chat template: A conversation cannot be read in one pass, .*: take `multi_turn: expand`"
    )
    with pytest.raises(ValueError, match=told):
        mimic_trainer(
            student, teacher, processor, tmp_path, dataset=rows, teacher_processor=templated(tokenizer, REWRITING)
        )
    said = "('other words' if m['role'] == 'assistant' else text(m)) | trim"
    shouting = TEMPLATES["gemma"].replace("text(m) | trim", said)
    with pytest.raises(ValueError, match="of the words of the responses have no counterpart in the teacher's"):
        mimic_trainer(
            student, teacher, processor, tmp_path, dataset=WHOLE, teacher_processor=templated(tokenizer, shouting)
        )


@pytest.mark.parametrize("talks", [CONVERSATIONS, LATER], ids=["pictures first", "pictures later"])
@pytest.mark.parametrize("form", ["completion", "messages"])
def test_the_student_answers_one_question_of_a_conversation(tokenizer, models, tmp_path, form, talks):
    processor = templated(tokenizer)
    student, teacher = models(processor, ())
    trainer = mimic_trainer(
        student.float(),
        teacher.float(),
        processor,
        tmp_path,
        dataset=rows_of(talks if form == "messages" else [as_row(row) for row in talks], feature_of(talks)),
        on_policy_share=1.0,
        on_policy_max_new_tokens=2,
    )
    rows = [trainer.train_dataset[number] for number in range(len(talks))]
    prompts = [[each["prompt"] for each in expanded(row)] for row in talks]
    drawn = [set() for _ in rows]
    for seed in range(8):
        torch.manual_seed(seed)
        for place, answered in enumerate(on_policy.answered_by_student(trainer, rows)):
            drawn[place].add(prompts[place].index(answered["prompt"]))
            assert len(answered["completion"]) == 1 and "messages" not in answered
            assert len(answered["images"]) == len(shown(answered["prompt"], rows[place]["images"]))
    assert [len(places) for places in drawn] == [len(each) for each in prompts], "every question comes in turn"
    trainer.train()
    assert trainer.state.log_history[0]["on_policy"] == 1.0


def test_the_divergence_that_is_measured_counts_every_answer(tokenizer, models):
    processor = templated(tokenizer)
    student, teacher = models(processor, ())
    later = rows_of([as_row(row) for row in LATER], PARTS)
    later_each = rows_of([each for row in LATER for each in expanded(row)], PARTS)
    for rows, singles in ((WHOLE, EACH), (later, later_each)):
        whole, each = (kl_to_teacher(student, teacher, processor, kind, batch_size=3) for kind in (rows, singles))
        assert whole == pytest.approx(each, rel=1e-9) and whole > 0.01


def test_the_first_question_of_a_conversation_is_asked_with_its_own_pictures(tokenizer, models):
    processor = templated(tokenizer)
    student, _ = models(processor, ())
    rows = [rows_of(kind, PARTS) for kind in ([as_row(row) for row in LATER], [expanded(row)[0] for row in LATER])]
    asked = [generate_answers(student.float(), processor, each, batch_size=3, max_new_tokens=3) for each in rows]
    assert asked[0] == asked[1]


def test_a_collator_of_ones_own_stays(tokenizer, models, tmp_path):
    processor = templated(tokenizer)
    student, _ = models(processor, ())
    args = AdaptConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, **RUN)
    own = AnswersCollator(processor, completion_only_loss=False)
    trainer = AdaptTrainer(student, args, train_dataset=WHOLE, processing_class=processor, data_collator=own)
    assert trainer.data_collator is own
    with pytest.raises(ValueError, match="`assistant_only_loss` is true, and it is of rows of `messages`"):
        args = AdaptConfig(output_dir=str(tmp_path), assistant_only_loss=True, **RUN)
        AdaptTrainer(student, args, train_dataset=WHOLE, processing_class=processor)
