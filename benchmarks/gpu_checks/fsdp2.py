"""
A process that `accelerate launch` starts: three steps of mimic distillation, and what is sharded meanwhile.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 1 \\
      benchmarks/gpu_checks/fsdp2.py FOLDER [cpu]

It reads `student/` in the folder and writes `saved/` and `found.json`.
"""

import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from gpu_checks.training import TEACHER
from helpers.ddp_gradients import mimic_trainer, rows
from llava_mod_hf import load_model_and_processor


class Sharded(TrainerCallback):
    """Counts the trained parameters that are in one piece."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trained, self.whole = len(trained), sum(not isinstance(parameter, DTensor) for parameter in trained)


def train(folder, device="cuda"):
    student, processor = load_model_and_processor(str(folder / "student"))
    teacher, _ = load_model_and_processor(TEACHER)
    sharded = Sharded()
    options = {"max_steps": 3, "bf16": True, "use_cpu": device == "cpu", "router_aux_loss_coef": 0.01}
    trainer = mimic_trainer(
        student, teacher, processor, folder / "run", dataset=rows(count=8), callbacks=[sharded], **options
    )
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    found = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "kind": str(trainer.accelerator.distributed_type),
        "trained": sharded.trained,
        "whole": sharded.whole,
    }
    if trainer.is_world_process_zero():
        (folder / "found.json").write_text(json.dumps(found))


def main(folder, *device):
    train(folder, *device)
    gc.collect()  # a wrapped model that is freed after its process group may wait for ever
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
