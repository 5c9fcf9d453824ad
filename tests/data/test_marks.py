"""Texts that spell out what the tokenizer reads as a picture or as the beginning of a turn."""

import pytest
from datasets import Dataset

from llava_mod_hf.data.dropped_rows import DroppedRows
from llava_mod_hf.data.fitting import fit_rows
from llava_mod_hf.data.marked_rows import leave_out_marked
from llava_mod_hf.data.marks import check_marks, marks_of, without_marks


def test_marks_are_the_tokens_of_roles_and_pictures(processor):
    assert set(marks_of(processor)) == {"<|system|>", "<|user|>", "<|assistant|>", "<image>"}


@pytest.mark.parametrize("mark", ["<|user|>", "<image>"])
def test_a_text_with_a_mark_is_refused_whatever_its_form(processor, mark):
    parts = [{"type": "text", "text": f"a {mark[:3]}"}, {"type": "text", "text": f"{mark[3:]} b"}]
    for content in (f"a {mark} b", parts):
        with pytest.raises(
            ValueError, match=rf"^Row 3: a text holds `{mark.replace('|', '[|]')}`, which the tokenizer"
        ):
            check_marks([{"role": "user", "content": content}], marks_of(processor), "Row 3")
    check_marks(
        [{"role": "user", "content": "an <im age>"}, {"role": "user", "content": None}], marks_of(processor), ""
    )
    check_marks([{"role": "user", "content": [{"type": "image"}]}], marks_of(processor), "Row 3")


def test_what_is_left_without_marks_holds_none(processor):
    marks = marks_of(processor)
    assert without_marks("a red<|user|> circle<image>", marks) == "a red circle"
    assert without_marks("<im<image>age>", marks) == ""
    assert without_marks("<image", marks) == "<image"


def test_a_conversation_with_a_placeholder_in_a_text_is_refused(processor):
    turns = [{"role": "user", "content": "an <image>?"}, {"role": "assistant", "content": "red"}]
    rows = Dataset.from_list([{"images": [], "messages": turns}])
    with pytest.raises(ValueError, match="Row 0: a text holds `<image>`"):
        fit_rows(rows, processor, max_length=None, assistant_only_loss=True)


def test_prompts_with_marks_are_refused_or_left_out(processor, caplog):
    prompts = [[{"role": "user", "content": text}] for text in ("what?", "<image> what?", "who?")]
    rows = Dataset.from_dict({"prompt": prompts, "source_row": [4, 9, 11]})
    with pytest.raises(ValueError, match="Row 9: a text holds `<image>`"):
        leave_out_marked(rows, processor)
    with pytest.raises(ValueError, match="Row 1: a text holds `<image>`"):
        leave_out_marked(rows.remove_columns("source_row"), processor)
    assert leave_out_marked(rows, processor, bad_rows="drop", dropped=DroppedRows(max_share=1))["source_row"][:] == [
        4,
        11,
    ]
    assert "Left out 1 of 3 rows, first: Row 9: a text holds `<image>`" in caplog.text
    with pytest.raises(ValueError, match="Each of the 1 prompts holds a mark"):
        leave_out_marked(rows.select([1]), processor, bad_rows="drop")
