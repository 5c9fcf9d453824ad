"""Files of a run that grow while it trains: a JSON object a line, each with the `step` that it is of."""

import json
from pathlib import Path

from transformers import TrainerCallback

ROUTER_FILE = "router.jsonl"  # what the routers did between two logs
EXAMPLES_FILE = "examples.jsonl"  # what the student answered at the evaluations

FILES = (ROUTER_FILE, EXAMPLES_FILE)


def read_lines(path):
    """`list[dict]`: what a file holds; nothing if it is not there. A last line that was cut off is left out."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def add_lines(path, entries):
    """Writes objects behind those that a file holds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


class BeginsLines(TrainerCallback):
    """Takes out of a run's files what is of steps that it takes again: all of them if it begins from the start."""

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        for path in (Path(args.output_dir, name) for name in FILES):
            kept = (
                [entry for entry in read_lines(path) if entry["step"] <= state.global_step] if state.global_step else []
            )
            path.unlink(missing_ok=True)
            if kept:
                add_lines(path, kept)
