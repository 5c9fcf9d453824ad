"""What a text must not spell out: read again, it would be a picture, or the beginning of somebody else's turn."""

from llava_mod_hf.data.formats import text_of


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
