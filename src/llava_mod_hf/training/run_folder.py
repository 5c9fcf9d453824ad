"""The folder of a run: begun, interrupted, taken up again, finished."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import yaml
from transformers import ProgressCallback

from llava_mod_hf.publishing.provenance import RECIPE_FILE, RUN_FILE
from llava_mod_hf.training.checkpoints import last_complete_checkpoint
from llava_mod_hf.training.progress import LossOnBar, StepTimer
from llava_mod_hf.training.run_recipe import recipe_of


def check_output_dir(folder):
    """
    Raises:
        ValueError: if the folder holds a finished run, which training again would overwrite.
    """
    if (Path(folder) / RUN_FILE).is_file():
        raise ValueError(f"`{folder}` holds a finished run: give another `output_dir`, or remove it.")


def start_run(*groups):
    """
    Refuses a folder that holds a finished run, and notes the options before a trainer changes any.

    Args:
        groups: the argument dataclasses of a stage, the trainer's last.

    Returns:
        [`~llava_mod_hf.training.run_recipe.Recipe`].

    Raises:
        ValueError: if `output_dir` holds a finished run.
    """
    check_output_dir(groups[-1].output_dir)
    return recipe_of(*groups)


def train_and_save(trainer, stage, recipe):
    """
    Trains, from the last complete checkpoint of the output folder if there is one, and saves what can be loaded.

    The output folder gets the weights, their code, the processor, `recipe.yaml` (every option, resolved) and, last,
    `run.json`.

    Returns:
        `dict`: what `run.json` holds: `stage`, `steps`, `seconds` (all of this start), `seconds_per_step` (without the
        first step), `first_loss`, `last_loss`, `log_history`, and `recipe` (the options that somebody chose).
    """
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(LossOnBar)
    timer = StepTimer()
    trainer.add_callback(timer)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    run = {
        "stage": stage,
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - start,
        "seconds_per_step": timer.seconds_per_step(),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "log_history": history,
        "recipe": recipe.changed,
    }
    output_dir = Path(trainer.args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir) as folder:
        trainer.save_model(folder)
        if trainer.is_world_process_zero():
            _move_checkpoint(Path(folder), output_dir)
            (output_dir / RECIPE_FILE).write_text(yaml.safe_dump(recipe.resolved))
            write_json(output_dir / RUN_FILE, run)
    return run


def save_checkpoint(model, processor, folder):
    """Writes weights, their code and the processor; the folder cannot be loaded before it is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        _move_checkpoint(Path(temporary), folder)


def _move_checkpoint(source, target):
    (source / "training_args.bin").unlink(missing_ok=True)  # a pickle, and `recipe.yaml` says the same
    # nothing loads a folder without `config.json`: it comes last
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        os.replace(path, target / path.name)


def write_json(path, value):
    """Writes a JSON file at once: it is whole or not there."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")
    os.replace(temporary, path)
