"""The folder of a run: begun, interrupted, taken up again, finished."""

import time
from dataclasses import dataclass
from pathlib import Path

from llava_mod_hf.data.dropped_rows import FILE, DroppedRows
from llava_mod_hf.data.mixture import count_sources
from llava_mod_hf.publishing.provenance import RUN_FILE
from llava_mod_hf.training.checkpoints import chosen_checkpoint
from llava_mod_hf.training.output_folder import (
    check_output_dir,
    clear_unfinished,
    move_checkpoint,
    told_when_not_written,
    unfinished_folder,
    write_json,
)
from llava_mod_hf.training.progress import StepTimer
from llava_mod_hf.training.run_recipe import Recipe, check_same_recipe, recipe_of, write_recipe
from llava_mod_hf.training.trainer_options import check_libraries


@dataclass
class BegunRun:
    """What a run begins with: its recipe, the checkpoint that it is taken up from, and where dropped rows go."""

    recipe: Recipe
    checkpoint: str | None
    dropped: DroppedRows


def start_run(*groups):
    """
    Refuses what would be found out late, and notes the options before a trainer changes any.

    Args:
        groups: the argument dataclasses of a stage, those of its data first, the trainer's last.

    Returns:
        [`BegunRun`].

    Raises:
        ValueError: if a logger or an optimiser is not installed, `output_dir` holds a finished run or another model, or
            the run that is taken up had other options or left no whole checkpoint.
    """
    args = groups[-1]
    check_libraries(args)
    check_output_dir(args.output_dir)
    recipe = recipe_of(*groups)
    checkpoint = chosen_checkpoint(args.resume_from_checkpoint, args.output_dir)
    if checkpoint is not None:
        check_same_recipe(checkpoint, recipe)
    if args.should_save:
        clear_unfinished(args.output_dir)
    dropped = DroppedRows(Path(args.output_dir, FILE), max_share=groups[0].max_bad_rows, writes=args.process_index == 0)
    return BegunRun(recipe, checkpoint, dropped)


def train_and_save(trainer, stage, begun):
    """
    Trains, from the checkpoint that the run begins with if there is one, and saves what can be loaded.

    The output folder gets the weights, their code, the processor, `recipe.yaml` (every option, resolved) and, last,
    `run.json`; then they are pushed, with `push_to_hub`.

    Args:
        trainer ([`~llava_mod_hf.training.safe_run.SafeRun`]).
        stage (`str`): what the run calls itself.
        begun ([`BegunRun`]): of [`start_run`].

    Returns:
        `dict`: what `run.json` holds: `stage`, `steps`, `seconds` (all of this start), `seconds_per_step` (without the
        first step), `first_loss`, `last_loss`, `log_history`, `recipe` (the options that somebody chose),
        `dropped_rows` (how many of each kind are in that file), and of a mixture `datasets`, as [`rows_of_each`].

    Raises:
        ValueError: if more rows of a stream were malformed than may be.
    """
    timer = StepTimer()
    trainer.add_callback(timer)
    trainer.recipe = begun.recipe
    start = time.perf_counter()
    trainer.train(begun.checkpoint or False)
    if trainer.args.process_index == 0 and trainer.args.dataloader_num_workers == 0:  # who has read a stream itself
        begun.dropped.judge()
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
        **rows_of_each(trainer),
        "dropped_rows": begun.dropped.counts(),
        "recipe": begun.recipe.changed,
    }
    output_dir = Path(trainer.args.output_dir)
    with told_when_not_written(output_dir), unfinished_folder(output_dir, trainer.args.should_save) as folder:
        trainer.save_model(folder, _internal_call=True)
        if trainer.is_world_process_zero():
            write_recipe(begun.recipe, folder)
            write_json(folder / RUN_FILE, run)
            move_checkpoint(folder, output_dir)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return run


def rows_of_each(trainer):
    """
    How many rows each data set of a mixture has given.

    Returns:
        `dict`: nothing, or of a mixture `datasets`: each one's name → `rows` in the mixture (`None` of a stream), and
        those that the steps `read`, resumed ones too.
    """
    if trainer.rows_read is None:
        return {}
    rows = trainer.train_dataset
    there = count_sources(rows) if hasattr(rows, "__len__") else {}
    read = zip(trainer.rows_read.names, trainer.rows_read.counts, strict=True)
    return {"datasets": {name: {"rows": there.get(name), "read": count} for name, count in read}}
