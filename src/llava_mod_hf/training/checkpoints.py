"""The checkpoints of an interrupted run."""

import re
from pathlib import Path


def last_complete_checkpoint(folder):
    """
    The checkpoint with the highest step that was written to the end, or `None`.

    The trainer writes `trainer_state.json` last; its own look-up takes a half-written folder too.
    """
    found = {
        int(match[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "trainer_state.json").is_file()
    }
    return str(found[max(found)]) if found else None
