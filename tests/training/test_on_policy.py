"""Batches that the student answers itself."""

import itertools

import pytest
import torch

from helpers.ddp_gradients import assert_gradients_close, mimic_trainer, raw_gradients, rows, sharpened
from llava_mod_hf.losses.divergences import divergence_rows
from llava_mod_hf.losses.rows import shift_for_next_token
from llava_mod_hf.training import on_policy


@pytest.fixture
def trainer_of(make_student, processor, tmp_path):
    def make(**args):
        student, teacher = (sharpened(make_student(moe_layers=[], seed=seed)) for seed in (0, 1))
        options = {"on_policy_share": 1.0, "on_policy_max_new_tokens": 4, "temperature": 1.0, "lm_weight": 0.5}
        return mimic_trainer(student, teacher, processor, tmp_path, **{**options, **args})

    return make


@pytest.fixture
def answers(monkeypatch):
    """The rows that the student answered, in order."""
    found = []
    plain = on_policy.answered_by_student

    def spy(trainer, examples):
        found.append(plain(trainer, examples))
        return found[-1]

    monkeypatch.setattr(on_policy, "answered_by_student", spy)
    return found


def texts(examples):
    return [example["completion"][0]["content"] for example in examples]


def test_the_students_answers_take_the_place_of_the_rows_and_only_the_divergence_counts(
    trainer_of, answers, make_student
):
    trainer = trainer_of()
    student, teacher = sharpened(make_student(moe_layers=[], seed=0)), trainer.teachers[0].model
    found = raw_gradients(trainer)
    (examples,) = answers
    assert texts(examples) != texts(rows())
    batch = trainer.data_collator.collator([dict(example) for example in examples])
    keep, _ = shift_for_next_token(batch.pop("labels"))
    with torch.no_grad():
        teacher_logits = teacher(**batch).logits[keep]
    loss = divergence_rows(student(**batch).logits[keep], teacher_logits).mean()
    loss.backward()
    assert_gradients_close(found, {n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    logs = trainer.state.log_history[0]
    assert logs["kl"] == pytest.approx(loss.item(), rel=1e-5)
    assert logs["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert "lm_loss" not in logs
    assert logs["on_policy"] == 1.0


def test_each_answer_is_what_the_student_generates_of_its_prompt(trainer_of, processor):
    trainer = trainer_of(on_policy_max_new_tokens=3)
    examples = [trainer.train_dataset[i] for i in range(3)]
    torch.manual_seed(5)
    found = on_policy.answered_by_student(trainer, examples)
    inputs = on_policy.prompt_inputs(examples, processor)
    torch.manual_seed(5)
    ids = trainer.model.eval().generate(**inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=3)
    new = ids[:, inputs["input_ids"].shape[1] :]
    assert new.shape[1] <= 3
    assert texts(found) == processor.batch_decode(new, skip_special_tokens=True)
    assert [example["prompt"] for example in found] == [example["prompt"] for example in rows().select(range(3))]


def test_a_mark_that_the_student_spells_out_is_left_out_of_its_answer(trainer_of, processor, monkeypatch):
    trainer = trainer_of(on_policy_max_new_tokens=16)
    examples = [trainer.train_dataset[i] for i in range(2)]
    ids = [
        processor.tokenizer(list(text), add_special_tokens=False)["input_ids"] for text in ("a <image>.", "<|user|>")
    ]
    spelt = torch.tensor([([*itertools.chain(*row)] + [processor.tokenizer.pad_token_id] * 16)[:16] for row in ids])
    assert processor.batch_decode(spelt, skip_special_tokens=True) == ["a <image>.", "<|user|>"]
    monkeypatch.setattr(
        trainer.model, "generate", lambda input_ids, **kwargs: torch.cat([input_ids, spelt], dim=1), raising=False
    )
    found = on_policy.answered_by_student(trainer, examples)
    assert texts(found) == ["a .", ""]
    batch = trainer.data_collator(found)
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16 * sum(len(row["images"]) for row in examples)


def test_prompts_are_those_of_the_collator_padded_on_the_left(trainer_of, processor):
    trainer = trainer_of()
    examples = [trainer.train_dataset[i] for i in range(4)]
    inputs = on_policy.prompt_inputs(examples, processor)
    batch = trainer.data_collator.collator([dict(example) for example in examples])
    for row in range(4):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        whole = batch["input_ids"][row].tolist()
        assert whole[: len(prompt)] == prompt
        assert batch["labels"][row][len(prompt)] != -100, "the response starts where the prompt ends"
        assert (batch["labels"][row][: len(prompt)] == -100).all()
    assert inputs["attention_mask"][:, -1].all()
    torch.testing.assert_close(inputs["pixel_values"], batch["pixel_values"])


def test_the_share_of_batches_is_drawn_by_the_seed(trainer_of, answers):
    def drawn(**args):
        answers.clear()
        trainer = trainer_of(on_policy_share=0.5, batch=1, dataset=rows(count=8), max_steps=8, **args)
        trainer.train()
        return [logs["on_policy"] for logs in trainer.state.log_history if "on_policy" in logs], [
            texts(examples) for examples in answers
        ]

    first, second, other = drawn(), drawn(), drawn(seed=3)
    assert first == second
    assert first[0] != other[0]
    assert set(first[0]) == {0.0, 1.0}


def test_a_resumed_run_draws_the_answers_of_a_whole_one(trainer_of, answers, tmp_path):
    options = {"batch": 1, "accumulation": 2, "dataset": rows(count=8), "max_steps": 3, "learning_rate": 0.01}
    options |= {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(**options)
    whole.train()
    expected = [texts(examples) for examples in answers]
    assert len(expected) == 6
    answers.clear()
    resumed = trainer_of(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [texts(examples) for examples in answers] == expected[4:]
    logged = [trainer.state.log_history[2]["kl"] for trainer in (whole, resumed)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-6)


def test_no_two_micro_batches_draw_by_the_same_seed():
    places = itertools.product(range(3), range(20), range(4), range(4))
    assert len({on_policy.answer_seed(*place) for place in places}) == 3 * 20 * 4 * 4


def test_tokens_are_counted_over_the_answers(trainer_of, answers):
    trainer = trainer_of(batch=2, accumulation=2)
    seen = []
    plain = trainer.compute_loss

    def spy(model, inputs, num_items_in_batch=None, **kwargs):
        seen.append((int((inputs["labels"][:, 1:] != -100).sum()), int(num_items_in_batch)))
        return plain(model, inputs, num_items_in_batch=num_items_in_batch, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    assert len(answers) == 2
    assert [total for _, total in seen] == [sum(tokens for tokens, _ in seen)] * 2


def test_evaluation_is_on_the_rows_own_answers(trainer_of, answers):
    trainer = trainer_of(per_device_eval_batch_size=4)
    metrics = trainer.evaluate(rows())
    assert not answers
    assert trainer.state.log_history[-1]["eval_lm_loss"] > 0
    assert "eval_loss" in metrics


def test_what_cannot_be_answered_or_judged_is_refused(trainer_of, make_student, processor, tmp_path):
    with pytest.raises(ValueError, match="`on_policy_share` is 1.5"):
        trainer_of(on_policy_share=1.5)
    with pytest.raises(ValueError, match="`kl_weight` is 0"):
        trainer_of(kl_weight=0.0)
    with pytest.raises(ValueError, match="`on_policy_max_new_tokens` is 0"):
        trainer_of(on_policy_max_new_tokens=0)
    with pytest.raises(ValueError, match="live teachers"):
        on_policy.check_on_policy(rows(), [object()])
    with pytest.raises(ValueError, match="rows with `images`, `prompt` and `completion`"):
        on_policy.check_on_policy(rows().remove_columns("prompt"), [])
