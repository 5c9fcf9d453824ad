"""Parquet folders that a command writes shard by shard: a shard is whole or absent, and all are of one making."""

import functools
import os
from pathlib import Path

import yaml

SHARDS_FILE = "shards.yaml"


def shard_path(folder, index, count):
    # the name by which `datasets` finds a split
    return Path(folder) / f"train-{index:05d}-of-{count:05d}.parquet"


def write_shards(folder, num_rows, settings, make, *, shard_size, process=0, num_processes=1):
    """
    Writes the shards that are not there yet.

    Args:
        folder (`str` or `Path`): of the data set; may hold shards of an interrupted run with the same settings.
        num_rows (`int`): rows that go in.
        settings (`dict`): plain values that determine what comes out.
        make (`Callable[[range], datasets.Dataset]`):
            Rows of the data set that the given rows become; must depend on nothing but its argument.
        shard_size (`int`): rows that go into a shard.
        process, num_processes (`int`, *optional*): of several that write at the same time, each its shards.

    Returns:
        `int`: shards written now.

    Raises:
        ValueError: if the folder holds shards with other settings, or files of another making.
    """
    folder = Path(folder)
    count = -(-num_rows // shard_size)
    settings = {**settings, "num_rows": num_rows, "shard_size": shard_size, "num_shards": count}
    path = folder / SHARDS_FILE
    if path.is_file():
        found = yaml.safe_load(path.read_text())
        differing = [name for name in {**settings, **found} if settings.get(name) != found.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"`{folder}` was begun with `{name}` {found.get(name)!r}, and this run has {settings.get(name)!r}: "
                "give another `output_dir`, or remove it."
            )
    elif folder.is_dir() and any(
        # another process may have begun in between
        not each.name.startswith(".") and each.name != SHARDS_FILE
        for each in folder.iterdir()
    ):
        raise ValueError(f"`{folder}` holds other files: give an empty or a new `output_dir`.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, lambda part: part.write_text(yaml.safe_dump(settings, sort_keys=False)), process)

    written = 0
    for index in range(process, count, num_processes):
        shard = shard_path(folder, index, count)
        if not shard.is_file():
            rows = make(range(index * shard_size, min(num_rows, (index + 1) * shard_size)))
            # in given batches: to choose them, `datasets` would look for the image files that a row names
            _write(shard, functools.partial(rows.to_parquet, batch_size=1000), process)
            written += 1
    return written


def _write(path, write, process):
    part = path.with_name(f".{path.name}.{process}.part")  # hidden: `datasets` does not read it
    write(part)
    os.replace(part, path)


def check_shards(folder):
    """
    Raises:
        ValueError: if the folder was begun by [`write_shards`] and shards are missing.
    """
    path = Path(folder) / SHARDS_FILE
    if path.is_file():
        count = yaml.safe_load(path.read_text())["num_shards"]
        missing = [i for i in range(count) if not shard_path(folder, i, count).is_file()]
        if missing:
            raise ValueError(
                f"`{folder}` lacks {len(missing)} of {count} shards: run the command that wrote it again, it goes on "
                "where it stopped."
            )
