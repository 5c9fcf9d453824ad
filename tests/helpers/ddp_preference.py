"""
Raw gradients of the preference trainer in two processes: `python ddp_preference.py FOLDER`, as `ddp_gradients.py`.
"""

import gc
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.ddp_gradients import raw_gradients, rows
from helpers.preference_trainers import preference_trainer

LOSSES = {
    "sigmoid": {},
    "margin": {},
    "kto_pair": {},
    "authors": {"loss_type": ["kto_pair"], "kto_reference_compat": True},
}


def train(folder):
    processor = AutoProcessor.from_pretrained(folder / "student")
    found = {}
    for name, options in LOSSES.items():
        student, teacher = (
            AutoModelForImageTextToText.from_pretrained(folder / part) for part in ("student", "teacher")
        )
        trainer = preference_trainer(
            student,
            teacher,
            processor,
            folder / "run",
            batch=2,
            dataset=rows("preferences"),
            **{"loss_type": [name], "ddp_backend": "gloo", **options},
        )
        assert trainer.accelerator.num_processes == 2
        found[name] = raw_gradients(trainer)
        found[f"log {name}"] = trainer.state.log_history[0]
    if trainer.is_world_process_zero():
        torch.save(found, folder / "gradients.pt")


def main(folder):
    train(folder)
    gc.collect()  # a wrapped model that is freed after its process group may wait for ever
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
