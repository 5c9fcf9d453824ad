"""Example answers of a run's evaluations: in its folder, and as a table in the trackers that have tables."""

from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from llava_mod_hf.training.run_lines import EXAMPLES_FILE, add_lines

NAME = "examples"  # in a tracker
COLUMNS = ("step", "set", "question", "answer", "prediction")

SHOWN = 32  # rows of an evaluation that a tracker gets; the file has all


def keep_examples(trainer, rows, predictions, prefix):
    """
    Writes a sample's questions, expected answers and predictions behind those of earlier evaluations.

    Args:
        trainer (`Trainer`): whose step, folder and trackers they are for.
        rows (`datasets.Dataset`): with `question` and `answer`.
        predictions (`list[str]`): one a row.
        prefix (`str`): what the evaluation's figures begin with, which tells several sets apart.
    """
    if not trainer.is_world_process_zero():
        return
    step = trainer.state.global_step
    texts = zip(rows["question"], rows["answer"], predictions, strict=True)
    found = [dict(zip(COLUMNS, (step, prefix, *row), strict=True)) for row in texts]
    add_lines(f"{trainer.args.output_dir}/{EXAMPLES_FILE}", found)
    shown = [list(entry.values()) for entry in found[:SHOWN]]
    for callback in trainer.callback_handler.callbacks:
        for kind, tell in TABLES:
            if isinstance(callback, kind):
                tell(callback, NAME if prefix == "eval" else f"{NAME}/{prefix}", shown, step)


def _to_wandb(callback, name, rows, step):
    import wandb

    if wandb.run is not None:  # which begins with the training
        wandb.log({name: wandb.Table(columns=list(COLUMNS), data=rows), "train/global_step": step})


def _to_trackio(callback, name, rows, step):
    import trackio

    if trackio.context_vars.current_run.get() is not None:
        trackio.log({name: trackio.Table(columns=list(COLUMNS), data=rows), "train/global_step": step})


def _to_tensorboard(callback, name, rows, step):
    if callback.tb_writer is not None:
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
        table = "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)
        callback.tb_writer.add_text(name, table, step)


def _cell(value):
    """A value in a table of Markdown, which ends a cell at a bar and a row at a line's end."""
    return " ".join(str(value).replace("|", "\\|").split())


# others of transformers' trackers have no tables that it logs to, or none of text
TABLES = (
    (WandbCallback, _to_wandb),
    (TrackioCallback, _to_trackio),
    (TensorBoardCallback, _to_tensorboard),
)
