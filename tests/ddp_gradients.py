"""
Raw gradients of a trainer, in one process or in several.

As a script it is one process of several: `python ddp_gradients.py FOLDER`, with `RANK` and `WORLD_SIZE` in the
environment, reads `student/` and `teacher/` there and writes the gradients of the first process to `gradients.pt`.
"""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from llava_mod_hf import MimicConfig, MimicTrainer, embedded

# Responses of different lengths: the first two rows have more tokens than the next two.
KINDS = ("caption", "caption", "yes/no", "color", "yes/no", "shape", "caption", "yes/no")
RUN = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_grad_norm": 0.0,  # no clipping: raw gradients are compared
    "train_sampling_strategy": "sequential",
    "max_length": None,
    "logging_steps": 1,
    "max_steps": 1,
}


@functools.cache
def rows(config="mixture", count=4):
    """The first embedded rows of the kinds that `KINDS` names, in its order."""
    dataset = embedded.load(config, "train")
    indices = {kind: iter([i for i, other in enumerate(dataset["kind"]) if other == kind]) for kind in set(KINDS)}
    return dataset.select([next(indices[kind]) for kind in KINDS[:count]])


def sharpened(model):
    """Random weights give almost uniform distributions, whose divergence says little: makes them differ."""
    model.lm_head.weight.data.mul_(10)
    return model


class RawGradients(TrainerCallback):
    """Keeps the gradients of each optimiser step as they are before it."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "module", model)
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def raw_gradients(trainer):
    """The gradients of the trainer's first step."""
    callback = RawGradients()
    trainer.add_callback(callback)
    trainer.train()
    return callback.steps[0]


def assert_gradients_close(actual, expected):
    """Equal up to rounding, measured by the largest gradient of all."""
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-4, "these gradients are too small to tell anything apart"
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


def mimic_trainer(student, teacher, processor, folder, *, dataset=None, callbacks=None, teacher_processor=None, **args):
    """A trainer of the shortest run; `batch` and `accumulation` are short for the arguments' names."""
    batch, accumulation = args.pop("batch", 4), args.pop("accumulation", 1)
    config = MimicConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **{**RUN, "lm_weight": 0.5, "temperature": 2.0, "router_aux_loss_coef": 0.0, **args},
    )
    return MimicTrainer(
        student,
        teacher,
        config,
        train_dataset=rows() if dataset is None else dataset,
        processing_class=processor,
        teacher_processor=teacher_processor,
        callbacks=callbacks,
    )


def gradients_of_two_processes(folder):
    """Runs this file in two processes and returns what it writes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    return torch.load(folder / "gradients.pt", weights_only=True)


def main(folder):
    processor = AutoProcessor.from_pretrained(folder / "student")
    gradients = {}
    for coef in (0.0, 1.0):
        student, teacher = (
            AutoModelForImageTextToText.from_pretrained(folder / name) for name in ("student", "teacher")
        )
        trainer = mimic_trainer(
            student, teacher, processor, folder / "run", batch=2, router_aux_loss_coef=coef, ddp_backend="gloo"
        )
        assert trainer.accelerator.num_processes == 2
        gradients[coef] = raw_gradients(trainer)
        gradients[f"log {coef}"] = trainer.state.log_history[0]
    if trainer.is_world_process_zero():
        torch.save(gradients, folder / "gradients.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
