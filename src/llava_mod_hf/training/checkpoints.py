"""The checkpoints of an interrupted run: which of them are whole, and which one is taken up."""

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # written last

# what `--resume_from_checkpoint` may be besides a path
WORDS = {"true": True, "last": True, "false": False}


def last_complete_checkpoint(folder):
    """
    The checkpoint with the highest step that was written to the end and is whole, or `None`.

    The trainer writes `trainer_state.json` last; its own look-up takes a half-written folder too. A checkpoint with a
    damaged file is passed over with a warning.
    """
    found = {
        int(match[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE_FILE).is_file()
    }
    for step in sorted(found, reverse=True):
        damage = damaged_file(found[step])
        if damage is None:
            return str(found[step])
        logger.warning("`%s` is cut off or damaged: the checkpoint is passed over.", damage)
    return None


def damaged_file(checkpoint):
    """
    `Path` of a file of a checkpoint that is not whole, or `None`: weights shorter than they say, a PyTorch file without
    its end, a JSON file that is none.
    """
    for path in sorted(path for path in Path(checkpoint).rglob("*") if path.is_file()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):  # compares the header with the file's size
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
                return path
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (SafetensorError, ValueError):
            return path
    return None


def chosen_checkpoint(choice, folder):
    """
    The checkpoint that a run begins from.

    Args:
        choice (`str`, `bool` or `None`):
            A checkpoint's path; `True`, `"true"` or `"last"` for the last whole one of `folder`, which has to be there;
            `False` or `"false"` for none, from the start; `None` for the last whole one, if there is any.
        folder (`str` or `Path`): the run's.

    Returns:
        `str` or `None`.

    Raises:
        ValueError: if the checkpoint is not there or is damaged.
    """
    choice = WORDS.get(str(choice).lower(), choice)
    if choice is False:
        return None
    if choice is None or choice is True:
        found = last_complete_checkpoint(folder)
        if choice and found is None:
            raise ValueError(
                f"`resume_from_checkpoint` asks for the last checkpoint, and `{folder}` has no whole one: leave it out."
            )
        return found
    if not (Path(choice) / STATE_FILE).is_file():
        raise ValueError(
            f"`resume_from_checkpoint` is `{choice}`, which is no folder with a {STATE_FILE}: give a checkpoint that "
            "was written to the end, `true` for the last one, or `false` to begin from the start."
        )
    damage = damaged_file(choice)
    if damage is not None:
        raise ValueError(f"`{damage}` is cut off or damaged: give another checkpoint as `resume_from_checkpoint`.")
    return str(choice)
