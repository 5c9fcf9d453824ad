"""What a run has left in its folder of how it went: what it logged, what its routers did, what it answered; and what
`evaluate` has measured of its routers."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from llava_mod_hf.publishing.provenance import RESULTS_FILE, RUN_FILE
from llava_mod_hf.training.checkpoints import STATE_FILE
from llava_mod_hf.training.run_lines import EXAMPLES_FILE, ROUTER_FILE, read_lines


@dataclass
class RunHistory:
    """
    Args:
        folder (`Path`).
        logs (`list[dict]`): of the trainer, each with its `step`.
        steps (`int`): taken until then.
        max_steps (`int` or `None`): to be taken, where the run does not say that it is finished.
        routers (`list[dict]`): lines of `router.jsonl` until that step.
        examples (`list[dict]`): lines of `examples.jsonl` until that step.
        finished (`dict`): what `run.json` says, of a finished run.
        measured (`dict`): the `routers` of `results.json`, what
            [`~llava_mod_hf.evaluation.router_use.router_use`] returned.
    """

    folder: Path
    logs: list
    steps: int
    max_steps: int | None = None
    routers: list = field(default_factory=list)
    examples: list = field(default_factory=list)
    finished: dict = field(default_factory=dict)
    measured: dict = field(default_factory=dict)

    def curves(self):
        """`dict[str, list[tuple[int, float]]]`: of each figure that was logged, steps and values in their order."""
        found = {}
        for entry in self.logs:
            for name, value in entry.items():
                if name not in ("step", "epoch") and isinstance(value, int | float):
                    found.setdefault(name, []).append((entry["step"], float(value)))
        return found


def read_run(folder):
    """
    Reads a finished run, one that still goes on or was cut off, a checkpoint of one, or a student that was measured.

    Args:
        folder (`str` or `Path`): with a `run.json` or else, itself or in a checkpoint, a `trainer_state.json`; the
            last one counts. Without both, a `results.json` that tells of routers is enough.

    Returns:
        [`RunHistory`].

    Raises:
        ValueError: if it is no run, or none that has logged anything.
    """
    folder = Path(folder)
    measured = _routers_of(folder / RESULTS_FILE)
    if (folder / RUN_FILE).is_file():
        run = _read(folder / RUN_FILE)
        history = RunHistory(folder, run.get("log_history") or [], run.get("steps") or 0, finished=run)
    else:
        states = [path for path in (folder / STATE_FILE, *folder.glob(f"checkpoint-*/{STATE_FILE}")) if path.is_file()]
        if not states and measured:
            return RunHistory(folder, [], 0, measured=measured)
        if not states:
            raise ValueError(_no_run(folder))
        state = max((_read(path) for path in states), key=lambda state: state.get("global_step") or 0)
        steps = state.get("global_step") or 0
        history = RunHistory(folder, state.get("log_history") or [], steps, max_steps=state.get("max_steps"))
    history.measured = measured
    if not history.curves():
        raise ValueError(f"`{folder}` is of a run that logged nothing: give one with `logging_steps`.")
    beside = folder.parent if re.fullmatch(r"checkpoint-\d+", folder.name) else folder
    for name, file in (("routers", ROUTER_FILE), ("examples", EXAMPLES_FILE)):
        lines = read_lines(beside / file)
        # a run that was cut off has lines of steps that it takes again
        setattr(history, name, [line for line in lines if line["step"] <= history.steps])
    return history


def _routers_of(path):
    found = _read(path).get("routers") if path.is_file() else None
    return found if isinstance(found, dict) else {}


def _read(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{path}` is cut off or damaged ({error}): give another run.") from error
    if not isinstance(found, dict):
        raise ValueError(f"`{path}` holds a {type(found).__name__}, and not what a run writes: give another folder.")
    return found


def _no_run(folder):
    if not folder.is_dir():
        return f"`{folder}` is no folder: give the `output_dir` of a run."
    inner = sorted(str(path.parent) for path in folder.glob(f"*/{RUN_FILE}"))
    hint = f"one of {', '.join(inner)}" if inner else "the `output_dir` of a stage"
    return f"`{folder}` is no run: it has no {RUN_FILE}, and no checkpoint with a {STATE_FILE}; give {hint}."
