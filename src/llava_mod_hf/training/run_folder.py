"""The folder of a run: begun, interrupted, taken up again, finished."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import ProgressCallback, TrainerCallback

from llava_mod_hf.data.load import DataArguments, load_rows  # noqa: F401 (the command line looks up its groups here)
from llava_mod_hf.publishing.provenance import RUN_FILE
from llava_mod_hf.training.mimic_trainer import MimicConfig, MimicTrainer  # noqa: F401
from llava_mod_hf.training.preference_trainer import PreferenceConfig, PreferenceTrainer  # noqa: F401
from llava_mod_hf.training.trainable import check_train_modules, set_trainable, train_only  # noqa: F401 (found here before)


@dataclass
class Recipe:
    """Every option of a run, resolved, and those that somebody chose; plain YAML values, without the Hub token."""

    resolved: dict
    changed: dict


def start_run(*groups):
    """
    Refuses a folder that holds a finished run, and notes the options before a trainer changes any.

    Args:
        groups: the argument dataclasses of a stage, the trainer's last.

    Returns:
        [`Recipe`].

    Raises:
        ValueError: if `output_dir` holds a finished run.
    """
    check_output_dir(groups[-1].output_dir)
    resolved, changed = {}, {}
    for group in groups:
        required = {item.name for item in dataclasses.fields(group) if _has_no_default(item)}
        # without these three a TrainingArguments cannot be made everywhere
        required |= {"output_dir", "use_cpu", "bf16"} & {item.name for item in dataclasses.fields(group)}
        default = type(group)(**{name: getattr(group, name) for name in required})
        for item in dataclasses.fields(group):
            if item.init and item.name != "hub_token":
                value = getattr(group, item.name)
                resolved[item.name] = value
                if item.name in required or value != getattr(default, item.name):
                    changed[item.name] = value
    return Recipe(**json.loads(json.dumps({"resolved": resolved, "changed": changed}, default=_plain)))


def _plain(value):
    """`accelerator_config` is a dataclass once it is parsed; as a string the recipe could not be read again."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


def _has_no_default(item):
    return item.init and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


class LossOnBar(ProgressCallback):
    """The parent prints every log line above the bar; the last loss beside it is enough, and `run.json` has all."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class StepTimer(TrainerCallback):
    """Time of a step, without that of the first: it starts the loader's processes and warms everything up."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def seconds_per_step(self):
        """`float`, or `None` after fewer than two steps."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1) if len(self.ends) > 1 else None


def check_output_dir(folder):
    """
    Raises:
        ValueError: if the folder holds a finished run, which training again would overwrite.
    """
    if (Path(folder) / RUN_FILE).is_file():
        raise ValueError(f"`{folder}` holds a finished run: give another `output_dir`, or remove it.")


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
            (output_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe.resolved))
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
