"""Several data sets as one: in one form, by their weights, each row with the name of where it is from."""

import logging

from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
)

from llava_mod_hf.data.formats import text_of
from llava_mod_hf.data.images import map_undecoded
from llava_mod_hf.data.problems import PROBLEM

MESSAGES = [{"role": Value("string"), "content": Value("string")}]

PARTS = [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}]

SOURCE = "source_dataset"  # column: the number of a row's data set, whose feature has their names

logger = logging.getLogger(__name__)


def mix_rows(datasets, names, weights=None, *, stopping_strategy=None, seed=0):
    """
    One data set of several.

    With weights w, each row is drawn from data set i with the probability wᵢ / Σ w, by `datasets.interleave_datasets`:
    the same `seed` gives the same order in every process, streamed or not. A stream that several workers of a data
    loader read is drawn anew in each of them. Without weights the data sets follow each other, each row once.

    Args:
        datasets (`list[datasets.Dataset]` or `list[datasets.IterableDataset]`): of equal columns.
        names (`list[str]`): what each is called, for counts and messages.
        weights (`list[float]`, *optional*): above 0, one for each.
        stopping_strategy (`str`, *optional*, defaults to `"first_exhausted"`): when a mixture with weights ends.
        seed (`int`, *optional*, defaults to 0): of the draws.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: with the column `source_dataset`, a `ClassLabel` of `names`.

    Raises:
        ValueError: if there are not as many names and weights as data sets.
    """
    if len(names) != len(datasets) or (weights is not None and len(weights) != len(datasets)):
        count = len(names) if weights is None else f"{len(names)} names and {len(weights)}"
        what = "names" if weights is None else "weights"
        raise ValueError(f"There are {len(datasets)} data sets and {count} {what}: give one of each.")
    label = ClassLabel(names=list(names))
    named = [_with_source(rows, number, label) for number, rows in enumerate(datasets)]
    if weights is None:
        mixed = concatenate_datasets(named)
    else:
        mixed = interleave_datasets(
            named,
            probabilities=[weight / sum(weights) for weight in weights],
            seed=seed,
            stopping_strategy=stopping_strategy or "first_exhausted",
        )
    if isinstance(mixed, Dataset):
        counts = count_sources(mixed)
        told = [
            f"{counts[name]} of `{name}`, which has {len(rows)}" for name, rows in zip(names, datasets, strict=True)
        ]
        logger.warning("The mixture has %d rows: %s.", len(mixed), "; ".join(told))
    return mixed


def _with_source(rows, number, label):
    if SOURCE in rows.column_names:  # of a mixture that was written down
        rows = rows.remove_columns(SOURCE)
    if isinstance(rows, Dataset):
        return rows.add_column(SOURCE, [number] * len(rows), feature=label)
    rows = map_undecoded(
        rows,
        lambda batch, indices: {**batch, SOURCE: [number] * len(indices), PROBLEM: [None] * len(indices)},
        features=Features({**rows.features, SOURCE: label, PROBLEM: Value("string")}),
    )
    # `datasets` takes what a map with features yields for decoded; what a removal yields it decodes
    return rows.remove_columns(PROBLEM)


def source_names(rows):
    """`list[str]`: the data sets that a mixture was made of; empty of any other rows."""
    feature = (getattr(rows, "features", None) or {}).get(SOURCE)
    return feature.names if isinstance(feature, ClassLabel) else []


def count_sources(rows):
    """`dict[str, int]`: rows of each data set of a mixture (`datasets.Dataset`)."""
    names, numbers = source_names(rows), rows.with_format("numpy")[SOURCE][:]
    return {name: int((numbers == number).sum()) for number, name in enumerate(names)}


def row_name(row, place, names=()):
    """
    A row for messages.

    Args:
        row (`dict`): its `source_row` and `source_dataset`, if it has them.
        place (`int`): among the rows, for one without a number of its own.
        names (`list[str]`, *optional*): of [`source_names`].
    """
    number = place if row.get("source_row") is None else row["source_row"]
    return f"Row {number} of `{names[row[SOURCE]]}`" if names and row.get(SOURCE) is not None else f"Row {number}"


def row_names(rows):
    """`list[str]`: all rows (`datasets.Dataset`) for messages."""
    columns = {name: rows[name][:] for name in ("source_row", SOURCE) if name in rows.column_names}
    known = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    names = source_names(rows)
    return [row_name(row, place, names) for place, row in enumerate(known or [{}] * len(rows))]


class Readings:
    """
    A [`~llava_mod_hf.data.dropped_rows.Reading`] of each data set of a mixture, or the one of any other rows.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`).
        dropped ([`~llava_mod_hf.data.dropped_rows.DroppedRows`]): what they are written into.
    """

    def __init__(self, rows, dropped):
        names = source_names(rows)
        self.columns = [column for column in ("source_row", SOURCE) if column in (rows.column_names or [])]
        self._mixed, self._each = bool(names), [dropped.reading(each) for each in names or [dropped.dataset]]

    def known(self, rows, places):
        """`list[dict]`: the `columns` of the rows (`datasets.Dataset`) in a `range`."""
        columns = rows.select_columns(self.columns)[places.start : places.stop] if self.columns else {}
        return [{name: values[offset] for name, values in columns.items()} for offset in range(len(places))]

    def note(self, place, row, kind, reason):
        """Takes in one row (its `columns`) of many, at a place among them; see `Reading.note`."""
        self._of(row).note([(self._number(place, row), kind, reason)])

    def note_streamed(self, place, row, kind, reason):
        """The same of a stream; see `Reading.note_streamed`."""
        return self._of(row).note_streamed(place, self._number(place, row), kind, reason)

    def _of(self, row):
        return self._each[row[SOURCE] if self._mixed and row.get(SOURCE) is not None else 0]

    @staticmethod
    def _number(place, row):
        return place if row.get("source_row") is None else row["source_row"]

    def judge(self):
        """[`Reading.judge`] of each."""
        for reading in self._each:
            reading.judge()


def first_rows(rows, count):
    """The first `count` rows, all of them for `None`."""
    if count is None:
        return rows
    return rows.take(count) if isinstance(rows, IterableDataset) else rows.select(range(min(count, len(rows))))


class NeedsParts(ValueError):
    """A row has pictures elsewhere than before its first question, which texts alone cannot say."""


def plain_row(row, where):
    """
    A row whose messages are texts, which says the same as one of parts: the images come before the first question.

    Raises:
        NeedsParts: if images stand elsewhere.
    """
    messages = [message for turns in _messages_of(row).values() for message in turns]
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    if parts and not _lead(messages, parts, row["images"] or []):
        raise NeedsParts(
            f"{where} has a picture elsewhere than at the start of its first question, and the first rows of the "
            "stream have none there: leave out `streaming`, or put such a row among the first hundred."
        )
    return {**row, **{name: _with_contents(turns, text_of) for name, turns in _messages_of(row).items()}}


def parts_row(row):
    """A row whose messages are of parts, which says the same as one of texts."""
    found, images = {}, len(row["images"] or [])
    for name, turns in _messages_of(row).items():
        found[name] = _with_contents(turns, _as_parts)
        first = next((place for place, m in enumerate(turns) if m["role"] == "user"), None)
        if name == "prompt" and first is not None and isinstance(turns[first]["content"], str):
            found[name][first]["content"] = [{"type": "image", "text": None}] * images + found[name][first]["content"]
    return {**row, **found}


def _with_contents(messages, read):
    return [{"role": m["role"], "content": read(m["content"])} for m in messages]


def _as_parts(content):
    if isinstance(content, list):
        return [{"type": part.get("type"), "text": part.get("text")} for part in content]
    return [{"type": "text", "text": content or ""}]


def _messages_of(row):
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, list)
        and value
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    }


def _lead(messages, parts, images):
    """Whether the images stand at the start of the first question, all of them, and nowhere else."""
    first = next((m for m in messages if m["role"] == "user"), {"content": []})["content"]
    kinds = [part.get("type") for part in first] if isinstance(first, list) else []
    count = sum(part.get("type") == "image" for part in parts)
    return count == 0 or (count == len(images) and kinds[: len(images)] == ["image"] * len(images))


def in_one_form(datasets, names, columns, *, num_proc=None):
    """
    Data sets of equal columns: what the stage needs, and what all of them have besides.

    Args:
        datasets (`list`): as they were read, with `images` and `columns`.
        names (`list[str]`): for messages.
        columns (`tuple[str]`): what the stage needs.
        num_proc (`int`, *optional*): processes that convert rows.

    Returns:
        `list`: messages are of parts in all of them, if they are not equal already.

    Raises:
        ValueError: if one has texts where another has messages.
    """
    shared = [name for name in datasets[0].column_names if all(name in rows.column_names for rows in datasets)]
    needed = list(columns)
    target = {"images": List(Image()), **{name: datasets[0].features[name] for name in needed}}
    converted = [name for name in target if any(rows.features[name] != target[name] for rows in datasets)]
    for column in converted:
        texts = [isinstance(rows.features[column], Value) for rows in datasets]
        if any(texts) and not all(texts):
            raise ValueError(
                f"`{column}` of `{names[texts.index(True)]}` is a text and that of `{names[texts.index(False)]}` "
                "messages, which a chat template turns into text: write both as messages."
            )
        if column != "images":
            target[column] = Value("string") if all(texts) else Features({column: PARTS})[column]
    kept = ["images", "source_row", *needed]
    kept += [
        name
        for name in shared
        if name not in kept and all(rows.features[name] == datasets[0].features[name] for rows in datasets)
    ]
    target = {name: target[name] for name in converted}
    return [_in_form(rows, kept, target, name, num_proc) for rows, name in zip(datasets, names, strict=True)]


def _in_form(rows, kept, target, name, num_proc):
    """The columns `kept`, with row numbers; those in `target` with its features."""
    rows = rows.select_columns([column for column in kept if column in rows.column_names])
    numbered = "source_row" in rows.column_names
    if isinstance(rows, Dataset) and not numbered:
        rows = rows.add_column("source_row", list(range(len(rows))))
    if numbered and all(rows.features[column] == feature for column, feature in target.items()):
        return rows
    features = Features({**rows.features, "source_row": Value("int64"), **target})

    def convert(batch, indices):
        batch = {"source_row": indices, **batch}
        for place in range(len(indices)):
            row = parts_row({column: batch[column][place] for column in {"images", *target}})
            for column in target:
                batch[column][place] = row[column]
        return batch

    return map_undecoded(rows, convert, features=features, num_proc=num_proc, desc=f"Reading `{name}`")
