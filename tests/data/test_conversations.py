"""Conversations in one pass: the tokens of a row for each answer, whatever the chat template; else a row for each."""

import logging

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from helpers.templates import (
    CONVERSATIONS,
    LATER,
    PARTS,
    REWRITING,
    TALK,
    TEMPLATES,
    as_row,
    assistant,
    expanded,
    parts,
    picture,
    rows_of,
    templated,
    user,
)
from llava_mod_hf.data.conversations import AnswersCollator, RewrittenHistory, expand_conversations
from llava_mod_hf.data.fitting import fit_rows


def collated(collator, rows):
    return collator([dict(row) for row in rows])


def read_tokens(batch, row):
    """Ids and labels of a row, without its padding."""
    mask = batch["attention_mask"][row].bool()
    assert mask.sum() == mask.nonzero().max() + 1, "the padding is on the right"
    return batch["input_ids"][row][mask].tolist(), batch["labels"][row][mask].tolist()


@pytest.mark.parametrize("form", ["completion", "messages"])
@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("talks", [CONVERSATIONS, LATER], ids=["pictures first", "pictures later"])
def test_every_answer_has_the_tokens_and_the_context_of_its_own_row(tokenizer, template, form, talks):
    processor = templated(tokenizer, template)
    given = talks if form == "messages" else [as_row(row) for row in talks]
    batch = collated(AnswersCollator(processor, completion_only_loss=True), given)
    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    for number, row in enumerate(talks):
        ids, labels = read_tokens(batch, number)
        learnt = torch.full((len(ids),), -100)
        for each in expanded(row):
            own_ids, own_labels = read_tokens(collated(theirs, [each]), 0)
            assert ids[: len(own_ids)] == own_ids
            supervised = torch.tensor(own_labels) != -100
            learnt[: len(own_ids)][supervised] = torch.tensor(own_ids)[supervised]
        assert learnt.tolist() == labels
        assert len(ids) == len(own_ids), "nothing comes after the last answer"
    pictures = [picture for row in talks for picture in row["images"]]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], pixels), "pictures in the order of their turns"
    assert (batch["input_ids"] == processor.image_token_id).sum() == 16 * len(pictures)
    pad = batch["input_ids"][batch["attention_mask"] == 0]
    assert len(pad) and (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_text_alone_and_rows_of_one_answer_are_as_trl_has_them(tokenizer):
    processor = templated(tokenizer)
    ours = AnswersCollator(processor, completion_only_loss=True)
    theirs = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    single = [each for row in CONVERSATIONS for each in expanded(row)]
    for name, values in collated(theirs, single).items():
        assert torch.equal(collated(ours, single)[name], values), name
    assert "pixel_values" not in collated(ours, CONVERSATIONS[2:3])


@pytest.mark.parametrize("options", [{"completion_only_loss": False}, {"assistant_only_loss": True}])
def test_who_asks_for_trls_labels_gets_them(tokenizer, options):
    processor = templated(tokenizer)
    ours, theirs = AnswersCollator(processor, **options), DataCollatorForVisionLanguageModeling(processor, **options)
    for name, values in collated(theirs, CONVERSATIONS).items():
        assert torch.equal(collated(ours, CONVERSATIONS)[name], values), name


def test_whatever_lies_token_by_token_goes_on(tokenizer):
    """Some processors give a type for each token as well."""
    collator = AnswersCollator(templated(tokenizer), completion_only_loss=True)
    batch = collated(collator, [*expanded(CONVERSATIONS[3]), *expanded(CONVERSATIONS[2])])
    batch["mm_token_type_ids"] = (batch["input_ids"] == collator.processor.image_token_id).int()
    found = collator._joined(batch, [1, 2])
    assert set(found) == {"input_ids", "attention_mask", "labels", "mm_token_type_ids"}
    lengths, pad = batch["attention_mask"].sum(1).tolist(), collator.processor.tokenizer.pad_token_id
    for name, fill in (("input_ids", pad), ("labels", -100), ("mm_token_type_ids", 0), ("attention_mask", 0)):
        rows = [row[:length] for row, length in zip(batch[name].tolist(), lengths, strict=True)]
        rows = [rows[0], rows[1] + rows[2]]
        assert found[name].tolist() == [row + [fill] * (max(map(len, rows)) - len(row)) for row in rows], name


def test_a_limit_in_python_cuts_where_trl_would(tokenizer):
    processor = templated(tokenizer)
    whole = collated(AnswersCollator(processor, completion_only_loss=True), CONVERSATIONS[:2])
    for limit in (5, 30, 40, 1000):
        cut = collated(AnswersCollator(processor, completion_only_loss=True, max_length=limit), CONVERSATIONS[:2])
        for name in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(cut[name], whole[name][:, :limit]), (limit, name)


@pytest.mark.parametrize("talks", [CONVERSATIONS, LATER], ids=["pictures first", "pictures later"])
def test_with_questions_supervised_too_a_later_picture_is_read(tokenizer, talks):
    """What TRL itself reads of `messages`, which knows no prompt."""
    processor = templated(tokenizer, "marked")  # whose pieces are tokenised as the whole is
    found = collated(AnswersCollator(processor, completion_only_loss=False), [as_row(row) for row in talks])
    theirs = collated(DataCollatorForVisionLanguageModeling(processor), talks)
    for name, values in theirs.items():
        assert torch.equal(found[name], values), name


def thinking(*answers):
    turns = [turn for answer in answers for turn in (user("what?"), assistant(answer))]
    return {"images": [picture()], "messages": turns}


THINKING = [
    thinking("<think>hm</think>red", "<think>oh</think>blue"),
    thinking("red", "<think>oh</think>blue"),
    thinking("<think>hm</think>red"),
    thinking("<think>one</think>red", "blue", "green"),
]
SENTENCE = "the chat template writes a turn as '<think>hm</think>red<|im_end|>\\n' that is 'red<|im_end|>\\n"


@pytest.mark.parametrize("form", ["completion", "messages"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_template_that_rewrites_history_makes_a_row_of_each_answer(tokenizer, streaming, form, caplog):
    processor = templated(tokenizer, REWRITING)
    rows = rows_of(THINKING if form == "messages" else [as_row(row) for row in THINKING]).add_column("kind", [*"abcd"])
    source = rows.to_iterable_dataset() if streaming else rows
    with caplog.at_level(logging.WARNING):
        found = list(expand_conversations(source, processor))
    expected = [*expanded(THINKING[0]), as_row(THINKING[1]), as_row(THINKING[2]), *expanded(THINKING[3])]
    plain = [{name: row[name] for name in ("prompt", "completion")} for row in found]
    assert plain == [{name: row[name] for name in ("prompt", "completion")} for row in expected]
    assert [row["kind"] for row in found] == [*"aabcddd"]
    assert all(row["images"][0].size == (20, 10) for row in found)
    assert [record.message.count(SENTENCE) for record in caplog.records] == [1]
    assert streaming or "2 of 4 rows cannot be read in one pass" in caplog.text
    batch = collated(AnswersCollator(processor, completion_only_loss=True), found)
    assert "<think>one</think>red" in processor.decode(batch["labels"][4][batch["labels"][4] != -100])
    with pytest.raises(RewrittenHistory, match="cannot be read in one pass, since the chat template writes a turn as"):
        collated(AnswersCollator(processor, completion_only_loss=True), [as_row(THINKING[0])])


@pytest.mark.parametrize("form", ["completion", "messages"])
def test_rows_that_one_pass_can_read_are_not_copied_and_all_are_on_demand(tokenizer, form, caplog):
    rows = rows_of(CONVERSATIONS if form == "messages" else [as_row(row) for row in CONVERSATIONS])
    processor = templated(tokenizer)
    assert expand_conversations(rows, processor) is rows
    found = expand_conversations(rows, processor, every=True)
    expected = [each for row in CONVERSATIONS for each in expanded(row)]
    assert [(row["prompt"], row["completion"]) for row in found] == [(r["prompt"], r["completion"]) for r in expected]
    assert not caplog.records
    later = rows_of(LATER if form == "messages" else [as_row(row) for row in LATER], PARTS)
    assert expand_conversations(later, processor) is later
    found = [[len(row["images"]), row["completion"]] for row in expand_conversations(later, processor, every=True)]
    assert found == [[len(each["images"]), each["completion"]] for row in LATER for each in expanded(row)]
    pairs = rows_of([{"images": [], "prompt": TALK[:1], "chosen": TALK[1:2], "rejected": TALK[1:2]}])
    assert expand_conversations(pairs, processor, every=True) is pairs


@pytest.mark.parametrize("form", ["completion", "messages"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_length_of_a_conversation_is_all_of_it_and_too_long_ones_are_left_out(tokenizer, form, streaming, caplog):
    processor = templated(tokenizer, "chatml")
    batch = collated(AnswersCollator(processor, completion_only_loss=True), CONVERSATIONS)
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = rows_of(CONVERSATIONS if form == "messages" else [as_row(row) for row in CONVERSATIONS])
    for limit in (None, max(lengths), max(lengths) - 1, min(lengths)):
        fitted, report = fit_rows(rows.to_iterable_dataset() if streaming else rows, processor, max_length=limit)
        expected = [number for number, length in enumerate(lengths) if limit is None or length <= limit]
        kept = list(fitted)
        assert [row["length"] for row in kept] == [lengths[number] for number in expected]
        assert [[each.size for each in row["images"]] for row in kept] == [
            [each.size for each in CONVERSATIONS[number]["images"]] for number in expected
        ]
        assert report["too_long"] == len(lengths) - len(expected) and report["longest"] == max(lengths)
    later = collated(AnswersCollator(processor, completion_only_loss=True), LATER)["attention_mask"].sum(1).tolist()
    rows_later = rows_of(LATER if form == "messages" else [as_row(row) for row in LATER], PARTS)
    fitted, _ = fit_rows(rows_later.to_iterable_dataset() if streaming else rows_later, processor, max_length=None)
    assert [(row["length"], row["num_images"]) for row in fitted] == list(zip(later, (2, 3, 0), strict=True))
    fitted, report = fit_rows(rows, processor, max_length=None, multi_turn="expand")
    assert len(fitted) == report["rows"] == sum(len(expanded(row)) for row in CONVERSATIONS)


def test_what_one_pass_cannot_read_is_named(tokenizer):
    processor = templated(tokenizer)
    shown = {"images": [picture()], "prompt": [user(parts("hello?"))], "completion": [assistant(parts(None, "hi"))]}
    with pytest.raises(ValueError, match="an answer holds a picture: put it into a question"):
        fit_rows(rows_of([shown], PARTS), processor, max_length=None)
    more = as_row(LATER[0]) | {"images": [picture()] * 3}
    with pytest.raises(ValueError, match="Number of images provided .3. does not match"):
        collated(AnswersCollator(processor, completion_only_loss=True), [more])
    for rows, told in (
        ([{"images": [], "messages": TALK[1:2]}], "Row 0.*has no question"),
        ([{"images": [], "messages": [*TALK[:3], assistant(" ")]}], "Row 0: an answer is empty"),
        ([{"images": [], "messages": [*TALK[:2], user("<image>"), TALK[3]]}], "Row 0: a text holds `<image>`"),
    ):
        with pytest.raises(ValueError, match=told):
            fit_rows(rows_of(rows), processor, max_length=None)
    with pytest.raises(ValueError, match="`assistant_only_loss` is true, and it is of rows of `messages`"):
        fit_rows(rows_of([as_row(CONVERSATIONS[0])]), processor, max_length=None, assistant_only_loss=True)
