"""Parquet folders that a command writes shard by shard: a shard is whole or absent, and all are of one making."""

import functools
import hashlib
import os
from pathlib import Path

import yaml

SHARDS_FILE = "shards.yaml"

CHECKSUM = ".b2sum"


def shard_path(folder, index, count):
    # the name by which `datasets` finds a split
    return Path(folder) / f"train-{index:05d}-of-{count:05d}.parquet"


def write_shards(folder, num_rows, settings, make, *, shard_size, process=0, num_processes=1, option="output_dir"):
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
        option (`str`, *optional*): what the user names the folder by.

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
        found = read_settings(folder)
        differing = [name for name in {**settings, **found} if settings.get(name) != found.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"`{folder}` was begun with `{name}` {found.get(name)!r}, and this run has {settings.get(name)!r}: "
                f"give another `{option}`, or remove it."
            )
    elif folder.is_dir() and any(
        # another process may have begun in between
        not each.name.startswith(".") and each.name != SHARDS_FILE
        for each in folder.iterdir()
    ):
        raise ValueError(f"`{folder}` holds other files: give an empty or a new `{option}`.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, lambda part: part.write_text(yaml.safe_dump(settings, sort_keys=False)), process)

    written = 0
    for index in range(process, count, num_processes):
        shard = shard_path(folder, index, count)
        if not shard.is_file() or _is_damaged(shard):
            rows = make(range(index * shard_size, min(num_rows, (index + 1) * shard_size)))
            _checksum_path(shard).unlink(missing_ok=True)
            # in given batches: to choose them, `datasets` would look for the image files that a row names
            _write(shard, functools.partial(rows.to_parquet, batch_size=1000), process)
            checksum = _checksum(shard)
            _write(_checksum_path(shard), lambda part, checksum=checksum: part.write_text(checksum + "\n"), process)
            written += 1
    return written


def _write(path, write, process):
    part = path.with_name(f".{path.name}.{process}.part")  # hidden: `datasets` does not read it
    write(part)
    os.replace(part, path)


def read_settings(folder):
    """
    The settings that the shards of a folder were made with.

    Raises:
        ValueError: if their file is damaged.
    """
    path = Path(folder) / SHARDS_FILE
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is damaged ({' '.join(str(error).split())}): remove its folder.") from error
    if not isinstance(found, dict):
        raise ValueError(f"`{path}` is damaged, it holds no settings: remove its folder.")
    return found


def _checksum_path(shard):
    # `datasets` would take a name that begins as the shard's does for data
    return shard.with_name(f"checksum-{shard.stem}{CHECKSUM}")


def _checksum(shard):
    digest = hashlib.blake2b(digest_size=16)
    with shard.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_damaged(shard):
    """Whether a shard is another than was written; one without a checksum is not."""
    path = _checksum_path(shard)
    return path.is_file() and path.read_text().strip() != _checksum(shard)


def check_shards(folder):
    """
    Raises:
        ValueError: if the folder was begun by [`write_shards`], and shards are missing or another than were written.
    """
    if (Path(folder) / SHARDS_FILE).is_file():
        count = read_settings(folder).get("num_shards", 0)
        missing = [i for i in range(count) if not shard_path(folder, i, count).is_file()]
        if missing:
            raise ValueError(
                f"`{folder}` lacks {len(missing)} of {count} shards: run the command that wrote it again, it goes on "
                "where it stopped."
            )
        damaged = [shard for i in range(count) if _is_damaged(shard := shard_path(folder, i, count))]
        if damaged:
            raise ValueError(
                f"`{damaged[0]}` is damaged, it is not what was written: run the command that wrote `{folder}` again, "
                "it writes such shards anew."
            )
