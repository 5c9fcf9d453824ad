"""Rows that are held out of training: no picture and no row of the data set on both sides."""

import hashlib
from pathlib import PurePath

from datasets import Features, Image, IterableDataset, List, Value

from llava_mod_hf.data.images import map_undecoded
from llava_mod_hf.data.mixture import SOURCE

IMAGES = ("images", "image")

ROW = "source_row"

KEYS = "held_out_keys"

FILE = "file "


def hold_out(rows, size, *, seed=0):
    """
    Splits rows into those that are trained on and those that are held out.

    Rows that share a picture, or that were one row of the data set (the turns of a conversation), stay together. Which
    of these groups are held out is drawn by the seed from what they are, not from where they stand: of two data sets
    with the same pictures mostly the same ones are, also where other rows were left out or came in another order, or
    the folder of the pictures was moved (of files of one name in several folders, those folders are told apart by their
    whole paths).

    Args:
        rows (`datasets.Dataset`): with `images` or `image`, `source_row` if they were converted, and
            `source_dataset` of a mixture.
        size (`float`): share of the rows below 1, else their number; at least so many are held out, in whole groups.
        seed (`int`, *optional*, defaults to 0).

    Returns:
        `tuple[Dataset, Dataset]`: training and held out, each in the order of `rows`.

    Raises:
        ValueError: if the rows are streamed, or one side would be empty.
    """
    if isinstance(rows, IterableDataset) or not hasattr(rows, "select"):
        raise ValueError(
            f"`test_split_size` is {size}, and these rows are streamed, or no data set of `datasets`: give rows that "
            "are not, or other rows to evaluate on."
        )
    wanted = size * len(rows) if size < 1 else size
    groups = _groups(_row_keys(rows))
    order = sorted(groups, key=lambda key: [_digest(f"{seed} {name}".encode()) for name in (_named(key), key)])
    held: set[int] = set()
    for key in order:
        if len(held) >= wanted:
            break
        held.update(groups[key])
    if len(held) == len(rows) or not held:
        raise ValueError(
            f"`test_split_size` is {size} of {len(rows)} rows, of which {len(groups)} groups of one picture or one row "
            "of the data set can be held out: none would be left to train on. Give less, or more rows."
        )
    return rows.select([number for number in range(len(rows)) if number not in held]), rows.select(sorted(held))


def count_pictures(rows):
    """
    How many different pictures rows have, by their files or bytes.

    Args:
        rows (`datasets.Dataset`): with `images` or `image`.

    Returns:
        `int` or `None`: `None` of rows that nobody has seen yet, a stream's, or whose pictures are of another kind.
    """
    found = _pictures(rows)
    return None if found is None else len(found)


def shared_pictures(rows, others):
    """
    How many pictures two data sets have in common, by their files or bytes: a file and a copy of it are two pictures.

    Args:
        rows, others (`datasets.Dataset`): with `images` or `image`.

    Returns:
        `tuple[int, int]` or `None`: different pictures of `others` that are in `rows` too, and all of `others`; `None`
        where [`count_pictures`] says it of one of the two.
    """
    known, found = _pictures(rows), _pictures(others)
    return None if known is None or found is None else (len(known & found), len(found))


def _pictures(rows):
    """`set[str]` of what pictures are told apart by, or `None`."""
    features = getattr(rows, "features", None)
    names = [name for name in IMAGES if (features or {}).get(name) in (Image(), List(Image()))]
    if isinstance(rows, IterableDataset) or not names:
        return None

    def keys(batch, indices):
        images = [[image for name in names for image in _as_list(batch[name], place)] for place in range(len(indices))]
        return {KEYS: [[_picture(image) for image in each] for each in images]}

    named = map_undecoded(
        rows.select_columns(names),
        keys,
        features=Features({KEYS: List(Value("string"))}),
        desc="Counting pictures",
        remove_columns=names,
    )
    return {key for own in named[KEYS][:] for key in own}


def _row_keys(rows):
    """`list[list[str]]`: what each row has in common with others, at least one thing each."""
    names = [name for name in (*IMAGES, ROW, SOURCE) if name in rows.column_names]
    if not names:
        return [[f"row {number}"] for number in range(len(rows))]

    def keys(batch, indices):
        found = []
        for place, number in enumerate(indices):
            own = [_picture(image) for name in IMAGES for image in _as_list(batch.get(name), place)]
            if batch.get(ROW) and batch[ROW][place] is not None:
                own.append(f"source {batch[SOURCE][place] if SOURCE in batch else ''} {batch[ROW][place]}")
            found.append(own or [f"row {number}"])
        return {KEYS: found}

    features = Features({KEYS: List(Value("string"))})
    named = map_undecoded(
        rows.select_columns(names), keys, features=features, desc="Telling pictures apart", remove_columns=names
    )
    return named[KEYS][:]


def _as_list(column, place):
    found = None if column is None else column[place]
    return found if isinstance(found, list) else [] if found is None else [found]


def _picture(image):
    """Its bytes, or the file that it lies in."""
    return _digest(image["bytes"]) if image["bytes"] is not None else f"{FILE}{image['path']}"


def _named(key):
    """A file's name without its folder; another key is as it is."""
    return PurePath(key).name if key.startswith(FILE) else key


def _digest(content):
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _groups(keys):
    """`dict[str, list[int]]`: rows that are connected by keys, by the smallest of those keys."""
    parent: dict[str, str] = {}

    def root(key):
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    for own in keys:
        first, *others = sorted(root(key) for key in own)
        for other in others:
            parent[other] = first
    groups: dict[str, list[int]] = {}
    for number, own in enumerate(keys):
        groups.setdefault(root(own[0]), []).append(number)
    return groups
