"""Questions of several options, asked once for each place that the options can have."""

from llava_mod_hf.evaluation.metrics.multiple_choice import LETTERS
from llava_mod_hf.evaluation.questions import ANSWER, QUESTION

OPTIONS, GROUP = "options", "group"


def options_of(row, where):
    """
    The options of a row: `options` or `choices`, a list, or columns `A`, `B`, … as MMBench has them.

    Raises:
        ValueError: if there are fewer than two, or more than letters.
    """
    options = row.get("options") or row.get("choices")
    if options is None:
        options = []
        for letter in LETTERS:
            if not row.get(letter) or row[letter] == "nan":  # so MMBench's tables have a missing one
                break
            options.append(row[letter])
    if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
        raise ValueError(f"{where} has the options {options!r:.80}: give a list of texts, or columns `A`, `B`, ….")
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(
            f"{where} has {len(options)} options: give 2 to {len(LETTERS)}, as a list `options` or in columns `A`, "
            "`B`, …."
        )
    return options


def right_place(answer, options, where):
    """
    Which option is right: the one of that letter, or of that text.

    Raises:
        ValueError: if it is none of them, or several.
    """
    places = [place for place, text in enumerate(options) if text == answer] or [
        place for place, letter in enumerate(LETTERS[: len(options)]) if letter == answer.strip().upper()
    ]
    if len(places) != 1:
        raise ValueError(
            f"{where} has the answer {answer!r:.80}, and {len(places)} of its options {options!r:.160} are that: give "
            "a letter, or one option's text."
        )
    return places[0]


def _with_text(prompt, text):
    """A prompt whose last turn asks another text, below its pictures."""
    *before, last = prompt
    content = last["content"]
    if isinstance(content, list):
        parts = [part for part in content if part.get("type") != "text"]
        content = [*parts, {**dict.fromkeys(content[0]), "type": "text", "text": text}]
    else:
        content = text
    return [*before, {**last, "content": content}]


def _ended(prompt, suffix):
    """A prompt whose last turn's last text has a suffix, in a line of its own."""
    *before, last = prompt
    content = last["content"]
    if isinstance(content, list):
        place = max(place for place, part in enumerate(content) if part.get("type") == "text")
        content = [*content]
        content[place] = {**content[place], "text": f"{content[place]['text']}\n{suffix}"}
    else:
        content = f"{content}\n{suffix}"
    return [*before, {**last, "content": content}]


def with_suffix(rows, suffix):
    """Rows (`datasets.Dataset`) whose questions end with a suffix, such as how to answer."""
    return _with_column(rows, "prompt", [_ended(prompt, suffix) for prompt in rows["prompt"]])


def _with_column(rows, name, values):
    feature = rows.features[name]
    return rows.remove_columns([name]).add_column(name, values, feature=feature)


def rotate(rows, texts):
    """
    Each question as many times as it has options, which move on by one place each time.

    Args:
        rows (`datasets.Dataset`): `prompt`, `completion`, `question` and `answer`.
        texts (`list[dict]`): the same with all other columns, of which [`options_of`] reads some; a `hint` stands
            before the question.

    Returns:
        `tuple`: the rows, whose questions have the options below them, a line `A. …` each, and whose `answer` and
        `completion` are the right letter; and their texts, with the `options` as they stand and the `group`, a number
        that the rotations of one question share.

    Raises:
        ValueError: if a row has no options, or no right one.
    """
    moved_texts = []
    for number, row in enumerate(texts):
        where = f"Row {number}"
        options = options_of(row, where)
        right = right_place(row[ANSWER], options, where)
        hint = row.get("hint")
        asked = f"{hint}\n{row[QUESTION]}" if hint and hint != "nan" else row[QUESTION]
        for step in range(len(options)):
            moved = options[step:] + options[:step]
            lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, moved, strict=False)]
            letter = LETTERS[(right - step) % len(options)]
            first, *_ = row["completion"]
            content = letter if isinstance(first["content"], str) else [{**first["content"][0], "text": letter}]
            asks = {"prompt": _with_text(row["prompt"], "\n".join([asked, *lines]))}
            answers = {"completion": [{**first, "content": content}], ANSWER: letter}
            moved_texts.append({**row, **asks, **answers, OPTIONS: moved, GROUP: number})
    rows = rows.select([row[GROUP] for row in moved_texts])
    for name in ("prompt", "completion", ANSWER):
        rows = _with_column(rows, name, [row[name] for row in moved_texts])
    return rows, moved_texts
