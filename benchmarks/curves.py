"""
Costs as curves: of the mimic loss, the step and the experts against what makes them grow, ours beside the rival.

    python benchmarks/curves.py --json FILE [--only length experts ...] [--rounds 3] [--threads 2] [--smallest]

Small widths, so that all points take minutes; ways take turns at each point. `length` and `rows` are positions of a
row, and how many of them are supervised; `vocabulary` that of the head; `experts` and `top_k` of one block, as
`moe_block.py` measures it; `step` is a whole step against the positions, as `mimic_step.py` measures it; `processes`
are steps of `MimicTrainer` and of TRL's `SFTTrainer` in 1 and 2 processes that speak by gloo, of one thread each, whose
batches stay as large: a flat curve is what a user hopes for. `--smallest` measures the first two points of each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

import mimic_loss
import mimic_step
import moe_block
import torch
from measuring import add_json, in_turns, rows_of, square_product, write_json
from trl import SFTTrainer

from llava_mod_hf import MimicConfig, MimicTrainer, build_student, load_model_and_processor, upcycle
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.training.progress import StepTimer
from llava_mod_hf.training.trainable import set_trainable

# of the loss: what is not varied
LOSS = {"positions": 1024, "supervised": 64, "vocabulary": 8192, "width": 128, "teacher_width": 256}

EXPERTS = {"experts": 4, "top_k": 2, "hidden": 256, "intermediate": 512}
TOKENS = 512

POINTS = {
    "length": [256, 512, 1024, 2048, 4096],
    "rows": [16, 64, 256, 1000],
    "vocabulary": [2048, 8192, 32768, 131072],
    "experts": [2, 4, 8, 16],
    "top_k": [1, 2, 4, 8],
    "step": [256, 512, 1024, 2048],
    "processes": [1, 2],
}

BATCH, STEPS = 16, 6  # of a process


def loss_point(args, **changed):
    """`{way: [seconds]}` of the loss; with one thing changed."""
    found = mimic_loss.options().parse_args([])
    vars(found).update(LOSS | changed | {"repeats": args.rounds})
    times, _ = mimic_loss.times_of(["floor", "ours", "selection", "trl_response", "trl", "authors"], found)
    return times


def experts_point(args, **changed):
    """`{way: [seconds]}` of one block, forward and backward; with one thing changed."""
    found = moe_block.options().parse_args(["--repetitions", str(args.rounds + 1), "--seconds", "0"])
    vars(found).update(EXPERTS | changed)
    return moe_block.measure(TOKENS, found)


def step_point(args, positions):
    """`{way: [seconds]}` of a step, forward and backward, with the time of as many multiplications."""
    torch.manual_seed(0)
    found = mimic_step.options().parse_args(
        ["--size", "small", "--layers", "2", "--positions", str(positions), "--dtype", "float32"]
    )
    with tempfile.TemporaryDirectory() as folder:
        steps, student, _ = mimic_step.contenders(found, folder)
        needed = mimic_step.count_products({"live": steps["live"]}, student)["live"][0] * 1e9
        product, count = square_product()
        times = in_turns({**steps, "floor": product}, args.rounds, before=student.zero_grad)
    return times | {"floor": [seconds * needed / count for seconds in times["floor"]]}


def processes_point(args, count):
    """`{way: [seconds of a step]}`, of a round each; the processes of a round are fresh."""
    times = {"ours": [], "sft": []}
    for _ in range(args.rounds):
        for name, seconds in times.items():
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            found = subprocess.run(
                [sys.executable, *launch, __file__, "--worker", name],
                env=environment, check=True, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            seconds.append(json.loads(found.stdout.splitlines()[-1]))
    return times


def worker(name):
    """Trains a few steps as one of several processes, and the first says how long one took."""
    torch.set_num_threads(1)
    teacher, processor = load_model_and_processor(mimic_step.TEACHER)
    student = upcycle(build_student(mimic_step.TEACHER, "embedded:tiny-student-lm")[0])
    set_trainable(student, None)
    rows = easy_vqa.load("mixture", "train").select(range(BATCH * STEPS * 2))
    with tempfile.TemporaryDirectory() as folder:
        args = MimicConfig(
            folder, per_device_train_batch_size=BATCH, max_steps=STEPS, lm_weight=1.0, use_cpu=True, bf16=False,
            gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True, seed=0,
        )  # fmt: skip
        parts = {"args": args, "train_dataset": rows, "processing_class": processor}
        trainer = SFTTrainer(student, **parts) if name == "sft" else MimicTrainer(student, teacher, **parts)
        timer = StepTimer()
        trainer.add_callback(timer)
        trainer.train()
    if trainer.is_world_process_zero():
        sys.stdout.write(f"\n{json.dumps(timer.seconds_per_step())}\n")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


CURVES = {
    "length": lambda args, x: loss_point(args, positions=x),
    "rows": lambda args, x: loss_point(args, supervised=x),
    "vocabulary": lambda args, x: loss_point(args, vocabulary=x),
    "experts": lambda args, x: experts_point(args, experts=x),
    "top_k": lambda args, x: experts_point(args, top_k=x, experts=max(POINTS["top_k"])),
    "step": step_point,
    "processes": processes_point,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smallest", action="store_true")
    add_json(parser)
    parser.add_argument("--worker", choices=["ours", "sft"], help=argparse.SUPPRESS)  # one of several processes
    args = parser.parse_args(argv)
    if args.worker:
        worker(args.worker)
        return
    torch.set_num_threads(args.threads)
    rows = []
    for curve in args.only:
        for x in POINTS[curve][:2] if args.smallest else POINTS[curve]:
            times = CURVES[curve](args, x)
            medians = ", ".join(f"{name} {statistics.median(each):.4f}" for name, each in times.items())
            sys.stdout.write(f"{curve} {x}: {medians} s\n")
            sys.stdout.flush()
            rows += rows_of(times, bases=[name for name in times if name not in ("ours", "live")], curve=curve, x=x)
    write_json(args.json, __file__, rows, argv, threads=args.threads)


if __name__ == "__main__":
    main()
