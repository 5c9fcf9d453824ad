"""What a text must not spell out: read again, it would be a picture, or the beginning of somebody else's turn."""

import logging

from llava_mod_hf.data.dropped_rows import MALFORMED, DroppedRows
from llava_mod_hf.data.formats import text_of
from llava_mod_hf.data.mixture import Readings, row_names

logger = logging.getLogger(__name__)


def marks_of(processor):
    """`list[str]`: the tokens that open a turn and that stand for a picture, which a tokenizer sees in any text."""
    tokenizer = processor.tokenizer
    named = {tokenizer.special_tokens_map.get(name) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    return list(dict.fromkeys([*(t for t in tokenizer.all_special_tokens if t not in named), processor.image_token]))


def find_mark(text, marks):
    """`str` or `None`: the first of `marks` that a text spells out."""
    return next((mark for mark in marks if mark in text), None)


def without_marks(text, marks):
    """
    A text without the marks that it spells out, as decoding leaves out those that are said as one token.

    Args:
        text (`str`): such as a model's answer, before it is read again.
        marks (`list[str]`): of [`marks_of`].

    Returns:
        `str`: it holds none, not even one that two halves make.
    """
    while (mark := find_mark(text, marks)) is not None:
        text = text.replace(mark, "")
    return text


def check_marks(messages, marks, where):
    """
    Args:
        messages (`list[dict]`): `role` and `content`, a text or a list of parts.
        marks (`list[str]`): of [`marks_of`].
        where (`str`): the row, for messages.

    Raises:
        ValueError: if a text spells out a mark.
    """
    for message in messages:
        mark = find_mark(text_of(message["content"]), marks)
        if mark is not None:
            raise ValueError(
                f"{where}: a text holds `{mark}`, which the tokenizer reads as a mark of its own, and which the chat "
                "template alone may write: write it otherwise, or leave out the row."
            )


def leave_out_marked(rows, processor, *, columns=("prompt",), bad_rows="error", dropped=None):
    """
    Rows whose texts spell out no mark, for those that do not go through
    [`~llava_mod_hf.data.fitting.fit_rows`], which does the same.

    Args:
        rows (`datasets.Dataset`): of messages, or of texts that have been through a template, which hold marks rightly.
        processor (`ProcessorMixin`): who reads them.
        columns (`tuple[str]`, *optional*): what is read of them.
        bad_rows (`str`, *optional*, defaults to `"error"`): `"drop"` leaves such a row out, with a warning.
        dropped ([`~llava_mod_hf.data.dropped_rows.DroppedRows`], *optional*): where it is written down.

    Returns:
        `datasets.Dataset`.

    Raises:
        ValueError: naming the row and the mark, or if no row is left, or more are left out than may be.
    """
    marks = marks_of(processor)
    readings = Readings(rows, DroppedRows() if dropped is None else dropped)
    known, kept, first = readings.known(rows, range(len(rows))), [], None
    for place, (where, *texts) in enumerate(zip(row_names(rows), *(rows[column] for column in columns), strict=True)):
        problem = None
        try:
            for messages in texts:
                if not isinstance(messages, str):
                    check_marks(messages, marks, where)
            kept.append(place)
        except ValueError as error:
            if bad_rows == "error":
                raise
            problem = str(error)
            first = first or problem
        readings.note(place, known[place], None if problem is None else MALFORMED, problem)
    if first is None:
        return rows
    if not kept:
        raise ValueError(f"Each of the {len(rows)} prompts holds a mark, first: {first}")
    logger.warning("Left out %d of %d rows, first: %s", len(rows) - len(kept), len(rows), first)
    readings.judge()
    return rows.select(kept)
