"""The published layouts of image-and-text data → TRL's rows, one row at a time."""

from collections.abc import Callable
from typing import NamedTuple

from llava_mod_hf.data.turns import (
    IMAGE_PLACEHOLDER,
    check_unicode,
    is_turn,
    llava_messages,
    llava_prompt,
    turn_message,
)

IMAGES = ("images", "image", "image_path")  # columns, the first that a row has

# of an image folder's metadata → where `image_references` looks
IMAGE_FOLDER_COLUMNS = {"file_name": "image", "file_names": "images"}


class Format(NamedTuple):
    """
    A layout of image-and-text data, and how a row of it becomes rows of TRL.

    Args:
        columns (`tuple[str, ...]`): a data set that has all of these is in it.
        read (`Callable[[dict, list, str], dict]`):
            A row that has `columns`, its images (undecoded) and where it is, for messages → what it says, in TRL's
            words: `messages` (a conversation), `prompt` with `completion`, `prompt` with `chosen` and `rejected`, or
            `prompt` alone. It raises a `ValueError` that begins with where, if the row is malformed.
        gives (`tuple[str, ...]`): the names that `read` returns.
        is_trl (`bool`): whether rows are in TRL's format already, so that a data set need not be read row by row.
        keeps (`tuple[str, ...]`): of `columns`, those that stay beside what is read of them.
    """

    columns: tuple
    read: Callable
    gives: tuple
    is_trl: bool = False
    keeps: tuple = ()


FORMATS: dict[str, Format] = {}  # the first whose columns are all there is taken


def register_format(name, columns, read, *, gives=("messages",), before=None):
    """
    Adds a format of data: all stages then know files and data sets that have its columns.

    Args:
        name (`str`): of the format, for messages.
        columns, read, gives: as in [`Format`].
        before (`str`, *optional*): the format that would take such rows for its own; by default it is the last.

    Raises:
        ValueError: if there is one of that name, none of the name `before`, or `gives` is nothing that a stage takes.
    """
    if name in FORMATS:
        raise ValueError(f"There is a format `{name}` already: give another name.")
    if before is not None and before not in FORMATS:
        raise ValueError(f"`before` is {before!r}: give one of {', '.join(FORMATS)}.")
    known = {entry.gives for entry in FORMATS.values()}
    if tuple(gives) not in known:
        raise ValueError(f"`gives` is {gives!r}: give one of {', '.join(map(str, sorted(known)))}.")
    entries = list(FORMATS.items())
    place = len(entries) if before is None else list(FORMATS).index(before)
    entries.insert(place, (name, Format(tuple(columns), read, tuple(gives))))
    FORMATS.clear()
    FORMATS.update(entries)


def recognise(columns, name):
    """
    Which of [`FORMATS`] a data set is in.

    Args:
        columns (`Iterable[str]`).
        name (`str`): of the data set, for the message.

    Returns:
        `str`: a key of `FORMATS`.

    Raises:
        ValueError: if it is in none of them.
    """
    columns = list(columns)
    for layout, entry in FORMATS.items():
        if set(entry.columns) <= set(columns):
            return layout
    known = "; ".join(f"{layout} ({', '.join(entry.columns)})" for layout, entry in FORMATS.items())
    raise ValueError(f"`{name}` has the columns {columns}, which is no known format: rename them to one of {known}.")


def image_references(row, where):
    """
    The images of a row, undecoded.

    Args:
        row (`dict`):
            `images`, `image` or `image_path`: nothing, a path, bytes, `{"bytes", "path"}`, or a list of these.
        where (`str`): the row, for messages.

    Returns:
        `list[dict]`: `{"bytes": bytes or None, "path": str or None}` each.
    """
    found = next((row[name] for name in IMAGES if row.get(name) is not None), [])
    references = []
    for image in found if isinstance(found, list) else [found]:
        image = {"path": image} if isinstance(image, str) else {"bytes": image} if isinstance(image, bytes) else image
        image = {"bytes": image.get("bytes"), "path": image.get("path")} if isinstance(image, dict) else {}
        right = isinstance(image.get("bytes"), bytes | None) and isinstance(image.get("path"), str | None)
        if not right or not any(image.values()):
            raise ValueError(f"{where}: an image is neither a path nor bytes nor a pair of them: mend the row.")
        references.append(image)
    return references


def text_of(content):
    """The text of a message's content, which is a string or a list of parts."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def pictures_of(prompt, images):
    """
    The pictures of a conversation that its first turns have.

    Args:
        prompt (`list[dict]`): those turns, messages; texts alone have all pictures before the first question.
        images (`list`): of the whole conversation, in order.

    Returns:
        `list`.
    """
    if not isinstance(prompt, list) or any(m["role"] == "user" and isinstance(m["content"], str) for m in prompt):
        return images
    return images[: sum(part.get("type") == "image" for part in _parts(prompt))]


def check_answer(answer, where):
    """
    Args:
        answer (`str` or `list[dict]`): a text, or messages.
        where (`str`): the row, for messages.

    Raises:
        ValueError: if there is no answer, or one is empty.
    """
    messages = _as_messages(answer)
    if messages and not (isinstance(messages, list) and all(map(_is_message, messages))):
        raise ValueError(f"{where}: an answer is {answer!r:.80}: give a text, or a list of `{{role, content}}`.")
    if not messages or not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where} has no answer: give it one, or leave out the row.")
    for message in messages:
        if message["role"] == "assistant" and not text_of(message["content"]).strip():
            raise ValueError(f"{where}: an answer is empty: give it a text, or leave out the row.")


def has_turns(row):
    """
    Whether the answers of a row or of a data set's features, in columns of TRL's, are turns by LLaVA's keys.

    Args:
        row (`dict` or `datasets.Features`).
    """
    answer = row.get("chosen")
    if isinstance(answer, list) and answer:
        answer = answer[0]
    answer = getattr(answer, "feature", answer)
    return isinstance(answer, dict) and "from" in answer


def check_pair(row, where):
    """
    Raises:
        ValueError: if an answer of a pair is missing or empty, or has images of its own.
    """
    for name in ("chosen", "rejected"):
        if not row.get(name):
            raise ValueError(f"{where} has no `{name}` answer: a pair needs both.")
    chosen, rejected = (
        [part for part in _parts(row[name]) if part.get("type") == "image"] for name in ("chosen", "rejected")
    )
    if chosen or rejected:
        raise ValueError(
            f"{where}: `chosen` has {len(chosen)} images of its own and `rejected` {len(rejected)}: both answer the "
            "same ones, which belong into `images`."
        )
    for name in ("chosen", "rejected"):
        check_answer(row[name], f"{where}, `{name}`")
        if not isinstance(row[name], str) and row[name][0]["role"] == "user":
            raise ValueError(f"{where}: `{name}` begins with a question: questions belong into the prompt, once.")


def _parts(messages):
    contents = [m["content"] for m in messages if _is_message(m)] if isinstance(messages, list) else []
    return [part for content in contents if isinstance(content, list) for part in content]


def _is_message(message):
    return (
        isinstance(message, dict)
        and {"role", "content"} <= message.keys()
        and isinstance(message["content"], str | list | None)
        and all(isinstance(part, dict) for part in message["content"] or () if isinstance(message["content"], list))
    )


def _as_messages(answer):
    """An answer as messages: a text, one turn or a list of turns; what is neither stays as it is, and is refused."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    turns = [answer] if isinstance(answer, dict) else answer
    if isinstance(turns, list) and turns and all(map(is_turn, turns)):
        return [turn_message(turn) for turn in turns]
    return turns


def answer_places(messages, first=1):
    """`list[int]`: where the answers of a conversation are; from `first` on, since a first turn has no question."""
    return [place for place in range(first, len(messages)) if messages[place]["role"] == "assistant"]


def one_row(messages, where):
    """
    A conversation as `prompt`, what comes before its first answer, and `completion`, from there to the last one.

    Raises:
        ValueError: if nothing comes before an answer.
    """
    places = answer_places(messages)
    if not places:
        raise ValueError(f"{where} has no question: give it one, or leave out the row.")
    return {"prompt": messages[: places[0]], "completion": messages[places[0] : places[-1] + 1]}


def each_answer(messages, first=1):
    """A conversation as a `prompt` and `completion` for every answer from turn `first` on."""
    return [{"prompt": messages[:place], "completion": [messages[place]]} for place in answer_places(messages, first)]


def read_row(row, layout, where, *, multi_turn="whole"):
    """
    One row of a published layout as rows of TRL.

    Args:
        row (`dict`).
        layout (`str`): a key of `FORMATS`.
        where (`str`): the row, for messages.
        multi_turn (`str`, *optional*, defaults to `"whole"`):
            `"whole"`: one row of a conversation, whose completion begins with the first answer and holds all turns
            after it; `"expand"`: a row for every answer, the turns before it as its prompt.

    Returns:
        `list[dict]`: each with `images` (undecoded) and `prompt` and `completion`, or `prompt`, `chosen` and
        `rejected`.

    Raises:
        ValueError: if the row lacks a part, has an empty answer, or its placeholders do not fit its images.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}: rows are `{{key: value}}`.")
    entry = FORMATS[layout]
    lacking = [name for name in entry.columns if name not in row]
    if lacking:
        raise ValueError(f"{where} has no {', '.join(f'`{name}`' for name in lacking)}: give it, or leave out the row.")
    check_unicode([row.get(name) for name in (*entry.columns, *IMAGES)], where)
    images = image_references(row, where)
    read = {"images": images, **entry.read(row, images, where)}
    if "messages" not in read:
        return [read]
    messages = read["messages"]
    check_answer(messages, where)
    whole = one_row(messages, where)
    if multi_turn == "whole":
        return [{"images": images, **whole}]
    return [{"images": pictures_of(each["prompt"], images), **each} for each in each_answer(messages)]


def _pair(row, prompt, images, where):
    if not prompt:
        raise ValueError(f"{where} has no question: give it one, or leave out the row.")
    answers = {name: row[name] for name in ("chosen", "rejected")}
    if not (isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers.values())):
        answers = {name: answer and _as_messages(answer) for name, answer in answers.items()}
        if isinstance(prompt, str):
            prompt = [{"from": "human", "value": prompt}]
        if isinstance(prompt, list) and not all(map(_is_message, prompt)):
            prompt = llava_prompt(prompt, len(images), where)
    check_pair(answers, where)
    return {"prompt": prompt, **answers}


def _read_rlaif_v(row, images, where):
    question = row["question"]
    if not isinstance(question, str | None):
        raise ValueError(f"{where}: the question is {question!r:.80}: give a text.")
    text = (question or "").replace(IMAGE_PLACEHOLDER, "").strip()
    return _pair(row, text and [{"role": "user", "content": text}], images, where)


def _read_llava_pair(row, images, where):
    return _pair(row, llava_prompt(row["conversations"], len(images), where), images, where)


def _read_llava(row, images, where):
    return {"messages": llava_messages(row["conversations"], len(images), where)}


def _read_texts(row, images, where):
    texts = row["texts"]
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{where}: `texts` must be a list of `{{user, assistant}}`, at least one.")
    if not all(isinstance(text, dict) and {"user", "assistant"} <= text.keys() for text in texts):
        raise ValueError(f"{where}: `texts` must be a list of `{{user, assistant}}`.")
    turns = (("human", "user"), ("gpt", "assistant"))
    turns = [{"from": role, "value": text[name]} for text in texts for role, name in turns]
    return {"messages": llava_messages(turns, len(images), where)}


def _read_question(row, images, where):
    turns = [{"from": "human", "value": row["question"]}, {"from": "gpt", "value": row["answer"]}]
    return {"messages": llava_messages(turns, len(images), where)}


def _read_answers(row, images, where):
    """A question with the answers of several annotators, as benchmarks have it: the first of the most frequent ones."""
    answers = row["answers"] if isinstance(row["answers"], list) else []
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: `answers` must be a list of texts, or of `{{answer}}`, at least one.")
    return _read_question({**row, "answer": max(answers, key=answers.count)}, images, where)


def _read_caption(row, images, where):
    """A picture and its text, as LLaVA's first stage has it: what is asked is the picture alone."""
    if not images:
        raise ValueError(f"{where} has no image that its `text` could be of: give it one, or leave out the row.")
    turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": row["text"]}]
    return {"messages": llava_messages(turns, len(images), where)}


PAIR, ANSWER = ("prompt", "chosen", "rejected"), ("prompt", "completion")

FORMATS |= {
    "preference": Format(PAIR, lambda row, images, where: _pair(row, row["prompt"], images, where), PAIR, is_trl=True),
    "prompt-completion": Format(ANSWER, lambda row, *_: {name: row[name] for name in ANSWER}, ANSWER, is_trl=True),
    "LLaVA pairs": Format(("conversations", "chosen", "rejected"), _read_llava_pair, PAIR),
    "LLaVA": Format(("conversations",), _read_llava, ("messages",)),
    "RLAIF-V": Format(("question", "chosen", "rejected"), _read_rlaif_v, PAIR),
    "messages": Format(("messages",), lambda row, *_: {"messages": row["messages"]}, ("messages",), is_trl=True),
    "prompt": Format(("prompt",), lambda row, *_: {"prompt": row["prompt"]}, ("prompt",), is_trl=True),
    "the_cauldron": Format(("texts",), _read_texts, ("messages",)),
    "question-answer": Format(("question", "answer"), _read_question, ("messages",)),
    "question-answers": Format(("question", "answers"), _read_answers, ("messages",), keeps=("answers",)),
    "image-text": Format(("image", "text"), _read_caption, ("messages",)),
}
