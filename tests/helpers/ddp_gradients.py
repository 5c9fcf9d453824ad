"""
Raw gradients of a trainer, in one process or in several.

As a script it is one process of several: `python ddp_gradients.py FOLDER MODE …`, with `RANK` and `WORLD_SIZE` in the
environment, reads `student/` and `teacher/` there and writes the gradients of the first process to `gradients.pt`.
"""

import copy
import functools
import gc
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from llava_mod_hf import LlavaModForConditionalGeneration, MimicConfig, MimicTrainer
from llava_mod_hf.commands.pretrain import image_processor
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.data.fitting import fit_rows
from llava_mod_hf.students.router_bias import router_biases
from llava_mod_hf.teachers.sharded import shard_layers, whole

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
# numbers of rows that two processes with batches of two fill up with one row, and with two
EVALUATED = (7, 6)
# for trainers whose gradients are compared: those of every parameter
TEMPERATURE, KL_WEIGHT, LM_WEIGHT = 2.0, 0.7, 0.5

TERMS = {"temperature": TEMPERATURE, "kl_weight": KL_WEIGHT, "lm_weight": LM_WEIGHT}

# two batches of eight rows for each of two processes, in one step
TOKENS = {"batch": 8, "max_tokens_per_batch": 80, "train_sampling_strategy": "group_by_length", "accumulation": 2}

EVERYTHING = ["vision_tower", "adaptor", "language_model"]


@functools.cache
def rows(config="mixture", count=4):
    """The first embedded rows of the kinds that `KINDS` names, in its order."""
    dataset = easy_vqa.load(config, "train")
    indices = {kind: iter([i for i, other in enumerate(dataset["kind"]) if other == kind]) for kind in set(KINDS)}
    return dataset.select([next(indices[kind]) for kind in KINDS[:count]])


def text_rows():
    """Rows without images: nothing of the vision tower or the adaptor is used."""
    return rows().map(lambda row: {"images": []})


def half_text_rows():
    """Two rows without images, and two with them."""
    return rows().map(lambda row, index: {"images": row["images"] if index > 1 else []}, with_indices=True)


def sharpened(model):
    """Random weights give almost uniform distributions, whose divergence says little: makes them differ."""
    model.lm_head.weight.data.mul_(10)
    return model


def smaller_images(model, processor):
    """A model of new weights that sees an image as 4 tokens instead of 16, and its processor."""
    config = copy.deepcopy(model.config)
    config.vision_config.image_size, config.image_seq_length = 32, 4
    with torch.random.fork_rng():
        torch.manual_seed(2)
        other = sharpened(LlavaModForConditionalGeneration(config).eval())
    own = copy.deepcopy(processor)
    own.image_processor = image_processor(32)
    return other, own


class RawGradients(TrainerCallback):
    """Keeps the gradients of each optimiser step as they are before it."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "module", model)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.steps.append({name: whole(gradient).clone() for name, gradient in gradients.items()})


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


def mimic_trainer(student, teacher, processor, folder, *, dataset=None, **args):
    """`batch` and `accumulation` are short for the arguments' names; what the trainer itself takes goes to it."""
    own = ("teacher_processor", "peft_config", "callbacks")
    kwargs = {name: args.pop(name) for name in own if name in args}
    batch, accumulation = args.pop("batch", 4), args.pop("accumulation", 1)
    config = MimicConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **{
            **RUN,
            "train_modules": EVERYTHING,
            "lm_weight": 0.5,
            "temperature": 2.0,
            "router_aux_loss_coef": 0.0,
            **args,
        },
    )
    return MimicTrainer(
        student,
        teacher,
        config,
        train_dataset=rows() if dataset is None else dataset,
        processing_class=processor,
        **kwargs,
    )


def gradients_of_two_processes(folder, script=__file__, modes=()):
    """Runs this file, or another script, in two processes and returns what it writes; `modes` are those of `train`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    common = {
        "PYTHONPATH": paths,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(folder), *modes],
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


def load(folder, *names):
    return [AutoModelForImageTextToText.from_pretrained(folder / name) for name in names]


def sharded_gradients(folder, processor):
    """
    The trainer's loss on a student and a teacher that FSDP2 has sharded, and its gradients.

    Not through `train`: accelerate turns FSDP2 on for accelerators alone, and leaves several CPU processes to DDP.
    """
    student, teacher = load(folder, "student", "teacher")
    trainer = mimic_trainer(student, teacher, processor, folder / "run", ddp_backend="gloo")
    shard_layers(teacher, trainer.accelerator)
    for layer in student.model.language_model.layers:
        fully_shard(layer)
    fully_shard(student)
    assert isinstance(student.lm_head.weight, DTensor)
    rank = trainer.accelerator.process_index
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in pair]) for pair in ((0, 1), (2, 3))]
    tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    trainer.compute_loss(student.train(), batches[rank], num_items_in_batch=tokens).backward()
    layers = teacher.model.language_model.layers
    assert all(isinstance(parameter, DTensor) for parameter in layers.parameters()), "sharded again after use"
    return trainer, {name: whole(p.grad) for name, p in student.named_parameters() if p.grad is not None}


def cached(folder, keep, gradients):
    """Steps without a cache of image features, with one that is empty, and with what that one has written."""
    seen, encode = [], SiglipVisionEmbeddings.forward
    SiglipVisionEmbeddings.forward = lambda self, pixels, *args, **kwargs: (
        seen.append(len(pixels)) or encode(self, pixels, *args, **kwargs)
    )
    for name in ("without", "written", "read"):
        seen.clear()
        cache = None if name == "without" else str(folder / "cache")
        trainer = keep(name, "teacher", train_modules=["adaptor", "language_model"], vision_cache=cache)
        gradients[f"pictures {name}"] = sum(seen)
        torch.distributed.barrier()  # the other process may be writing yet
    SiglipVisionEmbeddings.forward = encode
    return trainer


def train(folder, *modes):
    """
    `modes`: `plain` with and without the router aux, `other` processor, `text` alone, `adaptor` alone, `eval`uation of
    a number of rows that does not divide, `balance` of the routers, `fsdp2`, batches of a number of `tokens`, a `cache`
    of image features.
    """
    processor = AutoProcessor.from_pretrained(folder / "student")
    gradients = {}

    def keep(name, teacher, **options):
        student, teacher = load(folder, "student", teacher)
        options = {"batch": 2, "router_aux_loss_coef": 0.0, "ddp_backend": "gloo", **options}
        trainer = mimic_trainer(student, teacher, processor, folder / "run", **options)
        assert trainer.accelerator.num_processes == 2
        gradients[name] = raw_gradients(trainer)
        gradients[f"log {name}"] = trainer.state.log_history[0]
        return trainer

    for mode in modes:
        if mode == "plain":
            keep(0.0, "teacher")
            trainer = keep(1.0, "teacher", router_aux_loss_coef=1.0)
        elif mode == "other":
            trainer = keep(mode, mode, teacher_processor=AutoProcessor.from_pretrained(folder / mode))
        elif mode == "text":
            trainer = keep(mode, "teacher", dataset=text_rows(), gradient_checkpointing=True)
        elif mode == "eval":
            student, other = load(folder, "student", "other")
            trainer = mimic_trainer(
                student,
                other,
                processor,
                folder / "run",
                teacher_processor=AutoProcessor.from_pretrained(folder / "other"),
                per_device_eval_batch_size=2,
                ddp_backend="gloo",
                router_aux_loss_coef=0.1,
            )
            trainer.args.eval_answers = 3
            gradients[mode] = [trainer.evaluate(rows(count=count)) for count in EVALUATED]
        elif mode == "balance":
            trainer = keep(mode, "teacher", router_bias_update=0.25, train_modules=["adaptor"])
            gradients[mode] = router_biases(trainer.accelerator.unwrap_model(trainer.model))
        elif mode == "cache":
            trainer = cached(folder, keep, gradients)
        elif mode == "tokens":
            trainer = keep(mode, "teacher", dataset=fit_rows(rows(count=8), processor, max_length=None)[0], **TOKENS)
        elif mode == "adaptor":  # which the first process's rows do not reach
            trainer = keep(mode, "teacher", dataset=half_text_rows(), train_modules=["adaptor"])
        else:
            trainer, gradients[mode] = sharded_gradients(folder, processor)
    if trainer.is_world_process_zero():
        torch.save(gradients, folder / "gradients.pt")


def main(folder, *modes):
    train(folder, *modes)
    gc.collect()  # a wrapped model that is freed after its process group may wait for ever
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
