"""The stages through their trainers, and the raw gradients of one step."""

import math
import tempfile
from pathlib import Path

import torch

from gpu_checks.cases import gradient_errors, need_cuda, on_cuda
from gpu_checks.models import QUESTIONS, TEACHER, prompts
from helpers.ddp_gradients import mimic_trainer, raw_gradients, rows
from helpers.models import moe_blocks
from helpers.preference_trainers import preference_trainer
from llava_mod_hf import build_student, load_model_and_processor, recipes, upcycle
from llava_mod_hf.commands.quickstart_plan import EASY_VQA
from llava_mod_hf.training.output_folder import save_checkpoint

LANGUAGE_MODEL = "embedded:tiny-student-lm"
STEPS = 10
GRADIENT_BOUNDS = {"fp32": 1e-4, "bf16": 1e-2}  # of the norm of all gradients
PRECISIONS = {"fp32": (False, False), "bf16": (True, False), "fp16": (False, True)}  # bf16, fp16
# name → stage of the quickstart, its student, and options beyond its recipe
RUNS = {
    "adapt": ("adapt", None, {}),
    "mimic dense": ("mimic_dense", "dense", {}),
    "mimic sparse": ("mimic_sparse", "dense", {}),
    "prefer sigmoid": ("prefer", "sparse", {}),
    "prefer kto_pair": ("prefer", "sparse", {"loss_type": "kto_pair"}),
}


def make_student(*, sparse):
    """A new student of the embedded parts, with experts that differ if it is sparse; and its processor."""
    student, processor = build_student(TEACHER, LANGUAGE_MODEL)
    if sparse:
        student, generator = upcycle(student, layers="alternate"), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for block in moe_blocks(student):
                for parameter in block.experts.parameters():
                    parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    return student, processor


# Stages


def run_stage(device, name, precision):
    """A few steps by the recipe; what was saved is loaded anew and asked something."""
    stage, student, more = RUNS[name]
    bf16, fp16 = PRECISIONS[precision]
    if fp16:
        need_cuda(device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        options = {
            "output_dir": folder / "run",
            "max_steps": STEPS,
            "max_samples": 64,
            "per_device_train_batch_size": 4,
            "use_cpu": not on_cuda(device),
            "bf16": bf16,
            "fp16": fp16,
            "logging_steps": 1,
            "disable_tqdm": True,
            **more,
        }
        if student is not None:
            save_checkpoint(*make_student(sparse=student == "sparse"), folder / "student")
            options["student"] = folder / "student"
        recipe = recipes.packaged("recipes", f"tiny/{EASY_VQA.stages[stage].recipe}.yaml")
        argv = ["--config", str(recipe), *(str(part) for key, value in options.items() for part in (f"--{key}", value))]
        run = EASY_VQA.stages[stage].run(*recipes.parse(EASY_VQA.stages[stage].groups, argv))
        model, processor = load_model_and_processor(str(folder / "run"))
    model = model.to(device).eval()
    with torch.no_grad():
        logits = model(**prompts(processor, device, QUESTIONS[:2], pictures={0, 1})).logits
    losses = [entry["loss"] for entry in run["log_history"] if "loss" in entry]
    return {
        "steps missing": (STEPS - run["steps"], 0),
        "losses not finite": (sum(not math.isfinite(loss) for loss in losses) + (len(losses) != STEPS), 0),
        "logits not finite after loading": ((~logits.isfinite()).sum().item(), 0),
        "first loss": losses[0],
        "last loss": losses[-1],
        "seconds": run["seconds"],
    }


def stage_cases(device):
    for precision in PRECISIONS:
        for name in RUNS:
            yield f"{name} {precision}", lambda name=name, precision=precision: run_stage(device, name, precision)


# Gradients


def gradients(device, *, preference=None, sparse=True, count=4, **options):
    """Raw gradients of the first step on a device, of the mimic loss or of a preference loss."""
    student, processor = make_student(sparse=sparse)
    teacher, _ = load_model_and_processor(TEACHER)
    options["use_cpu"] = not on_cuda(device)
    with tempfile.TemporaryDirectory() as folder:
        if preference is None:
            trainer = mimic_trainer(student, teacher, processor, folder, dataset=rows(count=count), **options)
        else:
            dataset = rows("preferences", count)
            options = {"loss_type": [preference], "dataset": dataset, **options}
            trainer = preference_trainer(student, teacher, processor, folder, **options)
        if trainer.args.device.type != torch.device(device).type:
            raise ValueError(f"the trainer runs on {trainer.args.device}")
        return raw_gradients(trainer)


def compared(found, expected, precision="fp32"):
    overall, worst = gradient_errors(found, expected)
    return {"all parameters": (overall, GRADIENT_BOUNDS[precision]), "worst parameter": worst}


KINDS = {
    "mimic": {},
    "mimic jsd": {"divergence": "jsd"},
    "mimic, router aux": {"router_aux_loss_coef": 1.0},
    "sigmoid, router aux": {"preference": "sigmoid", "router_aux_loss_coef": 1.0},
    "kto_pair": {"preference": "kto_pair"},
}


def gradient_cases(device):
    """On the device and on the CPU; with `--device cpu` this says that a run can be repeated."""
    for name, options in KINDS.items():
        yield (
            f"{name}, {torch.device(device).type} against cpu, fp32",
            lambda options=options: compared(gradients(device, **options), gradients("cpu", **options)),
        )


def accumulation_cases(device):
    whole = {}

    def run(batch, accumulation):
        options = {"count": 8, "batch": batch, "accumulation": accumulation}
        if not whole:
            whole.update(gradients(device, count=8, batch=8))
        return compared(gradients(device, **options), whole)

    for accumulation in (2, 4):
        batch = 8 // accumulation
        yield (
            f"8 rows in 1 and {accumulation} batches, fp32",
            lambda batch=batch, accumulation=accumulation: run(batch, accumulation),
        )


def checkpointing_cases(device):
    for name, options in (("mimic, router aux", KINDS["mimic, router aux"]), ("sigmoid", {"preference": "sigmoid"})):
        for precision in ("fp32", "bf16"):

            def run(options=options, precision=precision):
                options = {**options, "bf16": precision == "bf16"}
                found = gradients(device, gradient_checkpointing=True, **options)
                return compared(found, gradients(device, **options), precision)

            yield f"{name}, with and without, {precision}", run
