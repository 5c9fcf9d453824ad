"""The option of a cache of image features, apart from the cache, so that `--help` need not import that."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass
class VisionOptions:
    """
    Args:
        vision_cache (`str`, *optional*):
            Folder in which the features of the frozen vision encoder are kept, a file a picture: what is there is read,
            in later epochs and by later stages and runs, and what is not is encoded and written. The same loss and
            gradients; a teacher's own encoder is cached too.
    """

    vision_cache: str | None = None


def check_vision_cache(args):
    """
    Raises:
        ValueError: if `vision_cache` is no folder that can be written, or the vision encoder is trained.
    """
    if args.vision_cache is None:
        return
    if not str(args.vision_cache):
        raise ValueError("`vision_cache` is '': give a folder, or leave it out.")
    folder = Path(args.vision_cache)
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError:  # no name of a file, or one behind a folder that nobody may look into
        there, writable = folder, False
    if not writable:
        raise ValueError(
            f"`vision_cache` is `{folder}`, and `{there}` is no folder that can be written: give another folder."
        )
    if "vision_tower" in (args.train_modules or ()):
        raise ValueError(
            f"`vision_cache` keeps the features of a frozen encoder, and `train_modules` is {args.train_modules}: "
            "leave out one of the two."
        )
