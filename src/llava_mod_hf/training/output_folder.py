"""A folder that a command writes: nothing in it is overwritten, and nothing can be loaded before it is whole."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from llava_mod_hf.publishing.provenance import RECIPE_FILE, RUN_FILE
from llava_mod_hf.training.hub_pushes import ADAPTER_FILE, UNFINISHED

CONFIGS = ("config.json", ADAPTER_FILE)  # of a model, or of an adapter: without either nothing can be loaded


def check_output_dir(folder):
    """
    Raises:
        ValueError: if the folder holds a finished run, which training again would overwrite, or a model that no run of
            this package was about to write.
    """
    folder = Path(folder)
    if (folder / RUN_FILE).is_file():
        raise ValueError(f"`{folder}` holds a finished run: give another `output_dir`, or remove it.")
    if any((folder / name).is_file() for name in CONFIGS) and not (folder / UNFINISHED).is_dir():
        raise ValueError(
            f"`{folder}` holds a model that would be overwritten: give a new or empty folder as `output_dir`."
        )


def save_checkpoint(model, processor, folder):
    """Writes weights, their code and the processor; the folder cannot be loaded before it is whole."""
    with unfinished_folder(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        move_checkpoint(temporary, Path(folder))


def copy_records(source, target):
    """What a card tells of a student's making, to what was made of it without training; nothing where it has none."""
    for record in (RECIPE_FILE, RUN_FILE):
        if (Path(source) / record).is_file():
            shutil.copyfile(Path(source) / record, Path(target) / record)


def move_checkpoint(source, target):
    """Moves what was written whole to where it is loaded from."""
    # nothing loads a folder without one of the first, and none is finished without `run.json`: they come last
    last = (*CONFIGS, RUN_FILE)
    for path in sorted(source.iterdir(), key=lambda path: last.index(path.name) if path.name in last else -1):
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        os.replace(path, target / path.name)


def write_json(path, value):
    """Writes a JSON file at once: it is whole or not there."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")
    os.replace(temporary, path)


@contextlib.contextmanager
def told_when_not_written(folder):
    """Says in one sentence that the disk is full, or what else went wrong when a folder was written."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # PyTorch and the tokenizers have words of their own for it
        written = isinstance(error, OSError | SafetensorError) or "PytorchStreamWriter" in str(error)
        if isinstance(error, ConnectionError) or not (written or "os error" in str(error)):
            raise
        raise OSError(
            f"`{folder}` could not be written ({' '.join(str(error).split())}): make room, and start again; the run "
            "goes on from its last whole checkpoint."
        ) from error


@contextlib.contextmanager
def unfinished_folder(folder, writes=True):
    """
    A folder inside another for what is not whole yet; what an earlier run left of it goes.

    Args:
        folder (`str` or `Path`): created if missing.
        writes (`bool`): whether this process is one of those that write, and clean up.
    """
    temporary = Path(folder, UNFINISHED)
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)


def clear_unfinished(folder):
    """Removes what a killed run had not written to the end."""
    for path in Path(folder).glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)
