"""
Commands that are killed from outside, at moments that a seed draws, and started again until they end.

    PYTHONPATH=tests python -m helpers.killing SPEC.json

Every attempt is a child of this process, which has imported what takes seconds: a moment is a number of events of the
child (a step, a checkpoint that begins, a shard, the last save), and some milliseconds after the last of them.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from transformers import Trainer

import llava_mod_cli
from llava_mod_hf.commands import cache_teacher, mimic, prefer  # noqa: F401 (imported once, for all attempts)
from llava_mod_hf.data import parquet_shards
from llava_mod_hf.training import run_folder

EVENTS = {
    "step": (Trainer, "training_step"),
    "checkpoint": (Trainer, "_save_checkpoint"),
    "shard": (parquet_shards, "_write"),
    "end": (run_folder, "write_recipe"),
}


def tells(pipe, names):
    """Makes this process write a byte when one of these events begins."""
    for name in names:
        owner, attribute = EVENTS[name]
        function = getattr(owner, attribute)

        def told(*args, _function=function, **kwargs):
            os.write(pipe, b".")
            return _function(*args, **kwargs)

        setattr(owner, attribute, told)


def attempt(argv, log, moment=None):
    """
    Runs a command in a child.

    Args:
        argv (`list[str]`): of `llava-mod`.
        log (`Path`): what it prints is appended there.
        moment (`tuple[str, int, float]`, *optional*): event, how many of them, and seconds after that it is killed.

    Returns:
        `int`: its exit code, negative a signal's number.
    """
    source, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        with contextlib.suppress(BaseException):
            tells(pipe, [moment[0]] if moment else [])
            code = llava_mod_cli.main(argv)
        os._exit(code)
    os.close(pipe)
    if moment is not None:
        _, count, delay = moment
        while count and os.read(source, 1):
            count -= 1
        if count == 0:
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    os.close(source)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_and_resume(argv, folder, events, kills, generator):
    """
    Starts a command again and again until it was killed so often and has ended.

    Args:
        argv (`list[str]`): without its `--output_dir`, or `--teacher_cache`, which is the last word that is missing.
        folder (`Path`): each new run gets a folder of its own below.
        events (`dict[str, int]`): what it is killed at, and up to how many of them an attempt is let go on.
        kills (`int`).
        generator (`random.Random`): of the moments.

    Returns:
        `tuple[list[str], list]`: folders of the runs that ended, and the moments.

    Raises:
        RuntimeError: if a run fails of its own.
    """
    ended, moments, number = [], [], 0
    while not ended or len(moments) < kills:
        moment = None
        if len(moments) < kills:
            name = generator.choice(list(events))
            moment = (name, generator.randint(1, events[name]), generator.uniform(0, 0.03))
        code = attempt([*argv, str(folder / str(number))], folder / "log", moment)
        if code == -signal.SIGKILL:
            moments.append(moment)
        elif code == 0:
            ended.append(str(folder / str(number)))
            number += 1
        else:
            raise RuntimeError(f"Exit code {code} after {moments}: {(folder / 'log').read_text()[-3000:]}")
    return ended, moments


def main(spec):
    """Reads what is to be run, and writes `killed.json` beside it: for each name `whole`, `ended` and `moments`."""
    path, found = Path(spec), {}
    jobs = json.loads(path.read_text())
    for name, job in jobs.items():
        folder = path.parent / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        argv = [word.replace("WHOLE", str(path.parent)) for word in job["argv"]]
        if attempt([*argv, str(folder / "whole")], folder / "log"):
            raise RuntimeError((folder / "log").read_text()[-3000:])
        ended, moments = kill_and_resume(argv, folder, job["events"], job["kills"], random.Random(job["seed"]))
        found[name] = {"whole": str(folder / "whole"), "ended": ended, "moments": moments}
    (path.parent / "killed.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
