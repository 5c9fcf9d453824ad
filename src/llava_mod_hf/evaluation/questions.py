"""What measures are of, from rows that say it in their turns alone, as a user's own conversations do."""

from datasets.features.features import require_decoding

from llava_mod_hf.data.formats import IMAGES, text_of
from llava_mod_hf.data.row_files import rows_of

QUESTION, ANSWER, KIND = "question", "answer", "kind"


def question_texts(columns):
    """
    The texts that answers are measured by.

    Args:
        columns (`dict[str, list]`): `prompt`, and `completion` or `chosen`, of messages; or the texts themselves.

    Returns:
        `dict[str, list[str]]`: `question`, `answer` and `kind` as they are there, or else the last turn before the
        first answer, that answer, and no kind.
    """
    answers = columns.get(ANSWER) or columns.get("completion") or columns["chosen"]
    return {
        QUESTION: columns.get(QUESTION) or [text_of(turns[-1]["content"]) for turns in columns["prompt"]],
        ANSWER: [turns if isinstance(turns, str) else text_of(turns[0]["content"]) for turns in answers],
        KIND: columns.get(KIND) or [""] * len(answers),
    }


def with_questions(rows):
    """
    Rows with [`question_texts`].

    Args:
        rows (`datasets.Dataset`): `prompt` and `completion`, of messages.

    Raises:
        ValueError: if they are texts, which a chat template has written already or never will.
    """
    if isinstance(rows[0]["prompt"], str):
        raise ValueError(
            "The prompts are texts, and a model is asked by its chat template: write them as messages, `role` and "
            "`content`."
        )
    given = {name: list(rows[name]) for name in rows.column_names if name not in ("images", "image")}
    for name, texts in question_texts(given).items():
        if name not in given:
            rows = rows.add_column(name, texts)
    return rows


def row_texts(rows, files=()):
    """
    All that is known of rows but their pictures.

    Args:
        rows (`datasets.Dataset`): as [`with_questions`] returns them.
        files (`list[Path]`, *optional*): those that the rows were converted from; columns that the rows have not are
            taken from there, by `source_row`.

    Returns:
        `list[dict]`: a row each.
    """
    pictures = [name for name, feature in rows.features.items() if name in IMAGES or require_decoding(feature)]
    texts = rows.remove_columns(pictures).to_list()
    if not files or "source_row" not in rows.column_names:
        return texts
    needed = {row["source_row"] for row in texts}
    known = {
        number: {name: value for name, value in row.items() if name not in IMAGES}
        for number, row in enumerate(rows_of(files))
        if number in needed
    }
    return [{**known[row["source_row"]], **row} for row in texts]
