"""Local files of rows: which of a folder belong to a split, and what stands in those that are read here."""

import csv
import json
import re
import tarfile

from llava_mod_hf.data.formats import IMAGE_FOLDER_COLUMNS
from llava_mod_hf.data.json_rows import json_rows
from llava_mod_hf.data.parquet_shards import check_shards

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tar")

METADATA = ("metadata.jsonl", "metadata.csv")  # beside the pictures of a folder, as `datasets` has it

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")  # suffixes in a shard


def files_of(path, split, option="dataset_name"):
    """
    The files that a local data set's rows are in.

    A folder has pictures with their `metadata.jsonl` or `metadata.csv`, or else files of Parquet, or else shards of
    WebDataset; those of a split are `SPLIT-…` or in a folder `SPLIT/`, and without such names all belong to `train`.

    Args:
        path (`Path`): a file or a folder.
        split (`str`): of a folder; a file is in none.
        option (`str`, *optional*, defaults to `"dataset_name"`): what the user names it by.

    Returns:
        `list[Path]`: all of one kind.

    Raises:
        ValueError: if there is no such file, or none of the split.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"The data file `{path}` does not exist: check `{option}`.")
        return [path]
    metadata = [place / name for place in (path / split, path) for name in METADATA if (place / name).is_file()]
    if metadata and (metadata[0].parent != path or split == "train"):
        return metadata[:1]
    check_shards(path)
    kind, files = "Parquet", sorted(path.rglob("*.parquet"))
    if not files and (shards := sorted(path.rglob("*.tar"))):
        kind, files = "WebDataset", shards

    # by name: `load_dataset(folder)` takes what it once read of another folder of that name, if it has a card
    def of_split(pattern):
        return [file for file in files if any(re.match(rf"({pattern})\b", p) for p in file.relative_to(path).parts)]

    chosen = of_split(re.escape(split)) or (files if split == "train" and not of_split("test|validation") else [])
    if not chosen:
        raise ValueError(
            f"The folder `{path}` has no {kind} files of the split `{split}`, only "
            f"{[file.name for file in files[:3]]}: name them `{split}-….{'tar' if kind == 'WebDataset' else 'parquet'}`"
            ", or give another split."
        )
    return chosen


def rows_of(files):
    """
    The rows of files that are read here, one after the other.

    Args:
        files (`Iterable[Path]`): JSON, CSV or shards of WebDataset.

    Yields:
        A row: a `dict`, if the file is right; pictures of a folder or a shard are its `image`, or its `images`.

    Raises:
        ValueError: if a file is damaged.
    """
    for path in files:
        rows = {".csv": csv_rows, ".tar": shard_rows}.get(path.suffix, json_rows)(path)
        yield from map(_with_picture, rows) if path.name in METADATA else rows


def _with_picture(row):
    """A row of an image folder, whose column of file names has a name of its own."""
    return (
        {IMAGE_FOLDER_COLUMNS.get(name, name): value for name, value in row.items()} if isinstance(row, dict) else row
    )


def csv_rows(path):
    """
    The rows of a CSV file: texts, or `None` where nothing stands.

    Raises:
        ValueError: if it is not text in UTF-8, or a row has more values than there are columns.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            for number, row in enumerate(csv.DictReader(file)):
                if None in row:
                    raise ValueError(
                        f"Row {number} of `{path}` has more values than columns: put texts with commas in quotes."
                    )
                yield {name: value or None for name, value in row.items()}
        except UnicodeDecodeError as error:
            raise ValueError(f"`{path}` is not text in UTF-8 ({error.reason}): save it as UTF-8.") from error
        except csv.Error as error:
            raise ValueError(f"`{path}` is not valid CSV ({error}): mend the file.") from error


def shard_rows(path):
    """
    The rows of a shard of WebDataset: files that follow each other under one name are a row.

    Not `datasets`' own reader: it takes the columns of the first rows for those of all.

    Raises:
        ValueError: if it is no archive, is cut off, or a `json` in it is none.
    """
    row: dict = {}
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                if not (member.isfile() and key and suffix):
                    continue
                if row and row["__key__"] != f"{folder}/{key}":
                    yield unwrap_sample(row)
                    row = {}
                row |= {"__key__": f"{folder}/{key}", suffix.lower(): _content(archive, member, suffix.lower(), path)}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"`{path}` is not a whole tar archive ({error}): replace it.") from error
    if row:
        yield unwrap_sample(row)


def _content(archive, member, suffix, path):
    """A file of an archive, as `datasets` reads it."""
    data = archive.extractfile(member).read()
    if suffix.rpartition(".")[2] in PICTURES:
        return {"bytes": data, "path": member.name}
    try:
        return json.loads(data) if suffix == "json" else data.decode() if suffix == "txt" else data
    except ValueError as error:
        raise ValueError(f"`{member.name}` of `{path}` is not valid {suffix} in UTF-8 ({error}): mend it.") from error


def sample_columns(features):
    """
    The columns of rows that are samples of WebDataset, as `datasets` reads them.

    Args:
        features (`datasets.Features`).

    Returns:
        `list[str]` or `None`: `None` of rows that are no samples.
    """
    if "__key__" not in features:
        return None
    fields = features.get("json")
    pictures = [name for name in features if name.rpartition(".")[2] in PICTURES]
    text = ["text"] if "txt" in features else []
    return [*dict.fromkeys([*(fields if isinstance(fields, dict) else ()), *text, *(["image"] if pictures else [])])]


def unwrap_sample(sample):
    """
    A sample of WebDataset as a row.

    Args:
        sample (`dict`): suffix → content: a `json` of the row's columns, its pictures, a `txt`.

    Returns:
        `dict`: the columns of `json`, `text`, and `image`, or of several pictures `images`.
    """
    row = sample.get("json")
    if not isinstance(row, dict | None):
        return row
    pictures = [content for name, content in sample.items() if name.rpartition(".")[2] in PICTURES and content]
    text = {"text": sample["txt"]} if sample.get("txt") is not None else {}
    found = {"image": pictures[0]} if len(pictures) == 1 else {"images": pictures} if pictures else {}
    return {**(row or {}), **text, **found}


def first_row(files, name):
    """
    The first row that is a `dict`, by which a format is told.

    Raises:
        ValueError: if there is none.
    """
    row = next((row for row in rows_of(files) if isinstance(row, dict)), None)
    if row is None:
        raise ValueError(f"`{name}` has no rows of `{{key: value}}`: nothing to train on.")
    return row


def first_odd_row(files):
    """The number of the first row that is no `dict`, or `None`."""
    return next((number for number, row in enumerate(rows_of(files)) if not isinstance(row, dict)), None)
