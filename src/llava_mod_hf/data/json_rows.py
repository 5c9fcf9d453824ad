"""The rows of a JSON file, read bit by bit: the published ones have a gigabyte."""

import json
from pathlib import Path

CHUNK = 1 << 20  # characters of a JSON file that are read at a time


def json_rows(path):
    """
    The rows of a JSON array or of JSON lines, read bit by bit: the published files have a gigabyte.

    Not `datasets`' own reader: it refuses columns of mixed type, such as `id` in `llava_v1_5_mix665k.json`.

    Args:
        path (`str` or `Path`).

    Yields:
        A row: a `dict`, if the file is right.

    Raises:
        ValueError: if the file is not JSON in UTF-8 (with or without a byte-order mark), or is cut off.
    """
    decoder, number, depth = json.JSONDecoder(), 0, 0
    with Path(path).open(encoding="utf-8-sig") as file:
        text, start, more = "", 0, True
        while True:
            # Between rows come white space, a comma, or the brackets of the whole.
            while start < len(text) and text[start] in " \t\r\n,[]":
                depth += {"[": 1, "]": -1}.get(text[start], 0)
                start += 1
            try:
                if start == len(text):
                    raise json.JSONDecodeError("no row yet", text, start)
                row, start = decoder.raw_decode(text, start)
            except json.JSONDecodeError as error:
                if more:
                    chunk = _read(file, max(CHUNK, len(text) - start), path)  # doubled: a long row stays linear
                    more, text, start = bool(chunk), text[start:] + chunk, 0
                    continue
                if start == len(text) and depth == 0:
                    return
                if start == len(text):
                    raise ValueError(f"`{path}` ends inside its list, after {number} rows: it was cut off.") from error
                raise ValueError(f"Row {number} of `{path}` is not valid JSON ({error}): mend the file.") from error
            yield row
            number += 1


def _read(file, size, path):
    try:
        return file.read(size)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`{path}` is not text in UTF-8 ({error.reason}): unpack it if it is compressed, and save it as UTF-8."
        ) from error
