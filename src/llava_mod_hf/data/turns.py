"""The turns of a conversation as LLaVA's data has them, and others by other names: as messages."""

import json

IMAGE_PLACEHOLDER = "<image>"

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

KEYS = (("from", "value"), ("role", "content"))


def is_turn(turn):
    """Whether it is a `dict` that has one of `KEYS`."""
    return isinstance(turn, dict) and any(set(keys) <= turn.keys() for keys in KEYS)


def _role_and_text(turn):
    # a row that `datasets` has read has the keys of all others, too
    return next(((turn[role], turn.get(text)) for role, text in KEYS if turn.get(role) is not None), (None, None))


def turn_message(turn):
    """A turn as `role` and `content`; a role that is none of `ROLES` stays, and is refused by who reads it."""
    role, content = _role_and_text(turn)
    role = ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": "" if content is None else content}


def llava_messages(turns, num_images, where):
    """
    The turns of a LLaVA conversation as messages.

    As in LLaVA's own preparation, a first turn that is not of the human is left out, and the images come before the
    text of their question, wherever in it the placeholders stand. A last question without an answer goes too.

    Args:
        turns (`list[dict]`): `from` and `value`, or `role` and `content`, whose roles are keys of `ROLES`.
        num_images (`int`): images of the row.
        where (`str`): the row, for messages.

    Returns:
        `list[dict]`: `role` and `content`, without placeholders: texts, or lists of parts in the questions of a
        conversation whose images are not all in the first one.
    """
    if not isinstance(turns, list) or not all(map(is_turn, turns)):
        raise ValueError(f"{where}: `conversations` must be a list of `{{from, value}}`, or of `{{role, content}}`.")
    odd = [value for _, value in map(_role_and_text, turns) if not isinstance(value, str | None)]
    if odd:
        raise ValueError(f"{where}: the `value` of a turn is {odd[0]!r:.80}: give a text.")
    unknown = [role for role, _ in map(_role_and_text, turns) if not isinstance(role, str) or role not in ROLES]
    if unknown:
        role = " ".join(str(unknown[0]).split())
        raise ValueError(f"{where}: a turn is from `{role:.80}`: it may be from {', '.join(ROLES)}.")
    messages = [turn_message(turn) for turn in turns]
    system = [message for message in messages[:1] if message["role"] == "system"]
    messages = messages[len(system) :]
    if messages and messages[0]["role"] == "assistant":
        messages = messages[1:]
    if messages and messages[-1]["role"] == "user":
        messages = messages[:-1]
    if not messages or any(message["role"] != ("user", "assistant")[i % 2] for i, message in enumerate(messages)):
        raise ValueError(f"{where}: a conversation must take turns of `human` and `gpt`, at least one of each.")
    places = [message["content"].count(IMAGE_PLACEHOLDER) for message in messages]
    if sum(places) not in (0, num_images) or any(places[1::2]):
        raise ValueError(
            f"{where} has {num_images} images and {sum(places)} `{IMAGE_PLACEHOLDER}` in its turns, "
            f"{sum(places[1::2])} of them in answers: there must be one for each image, all in questions."
        )
    for message, count in zip(messages, places, strict=True):
        if count:
            message["content"] = message["content"].replace(IMAGE_PLACEHOLDER, "").strip()
        if sum(places) > places[0] and message["role"] == "user":
            text = {"type": "text", "text": message["content"]}
            message["content"] = [*({"type": "image", "text": None} for _ in range(count)), text]
    return system + messages


def llava_prompt(turns, num_images, where):
    """The turns before an answer as messages, as [`llava_messages`] has them; the last one is a question."""
    answer = {"from": "gpt", "value": ""}
    return llava_messages([*turns, answer] if isinstance(turns, list) else turns, num_images, where)[:-1]


def check_unicode(values, where):
    """
    Raises:
        ValueError: if a text holds half of a character, which JSON can write, and neither a file nor a tokenizer takes.
    """
    try:
        json.dumps(values, ensure_ascii=False, default=lambda _: None).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start : error.end])
        raise ValueError(f"{where} holds {half}, half of a character: write it whole, or leave it out.") from error
