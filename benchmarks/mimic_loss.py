"""
Seconds and peak memory of the mimic loss, forward and backward, at the sizes of a Qwen2-0.5B student.

    python benchmarks/mimic_loss.py [--json FILE] [--repeats 12] [--threads 2] [--device cuda --dtype bfloat16]

One row of 704 positions (576 image tokens, 64 of a prompt, 64 of a supervised response), a vocabulary of 151,936,
widths 896 and 1,536, float32. Times are medians of runs in turns, so that all see the same machine. Memory, of a
process each, is the highest resident size (on a GPU, allocated) above that of the inputs (hidden states and heads),
gradients included: that of the student's head alone is 519 MiB.

- `floor`: the four matrix products that nobody can avoid: student and teacher forward on the 64 supervised rows, and
  the gradients of hidden states and head.
- `ours`: `llava_mod_hf.losses.chunked_mimic.chunked_mimic_loss`.
- `selection`: `losses.divergence_rows` on the logits of the supervised rows, by autograd.
- `trl`: TRL's `_chunked_divergence_loss` with a mask over all positions; without Triton it projects every one of them.
- `trl_response`: the same, given the hidden states of the response alone, as TRL's own trainer cuts them.
- `authors`: the formula of the authors' code, on the logits of all positions of both models.
- `ours_4x`: `ours` with four times as many unsupervised positions, whose memory should be that of `ours`.
"""

import argparse
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from measuring import MIB, add_json, in_turns, measured, resident, rows_of, write_json
from torch.nn import functional as F
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from llava_mod_hf.losses.chunked_mimic import chunked_mimic_loss
from llava_mod_hf.losses.divergences import divergence_rows
from llava_mod_hf.losses.rows import Head, ProjectedRows, shift_for_next_token


def make_inputs(args, positions):
    """Hidden states, heads and labels; heads scaled so that logits have a standard deviation of about 2."""
    generator = torch.Generator(args.device).manual_seed(0)
    on = {"generator": generator, "device": args.device}

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, **on).mul_(scale).to(getattr(torch, args.dtype))

    labels = torch.full((1, positions), -100, device=args.device)
    labels[:, -args.supervised :] = torch.randint(args.vocabulary, (1, args.supervised), **on)
    return {
        "student": randn(1, positions, args.width).requires_grad_(),
        "student_head": randn(args.vocabulary, args.width, scale=2 * args.width**-0.5).requires_grad_(),
        "teacher": randn(1, positions, args.teacher_width),
        "teacher_head": randn(args.vocabulary, args.teacher_width, scale=2 * args.teacher_width**-0.5),
        "labels": labels,
    }


def floor(student, student_head, teacher, teacher_head, labels):
    keep, _ = shift_for_next_token(labels)
    with torch.no_grad():
        rows = student[keep]
        logits = rows @ student_head.T
        teacher[keep] @ teacher_head.T
        student.grad = torch.zeros_like(student)
        student.grad[keep] = logits @ student_head
        student_head.grad = logits.T @ rows


def ours(student, student_head, teacher, teacher_head, labels):
    keep, targets = shift_for_next_token(labels)
    teachers = [ProjectedRows(teacher[keep], Head(teacher_head))]
    loss = chunked_mimic_loss(student[keep], Head(student_head), targets, teachers).loss
    loss.backward()
    return loss.item()


def selection(student, student_head, teacher, teacher_head, labels):
    keep, _ = shift_for_next_token(labels)
    rows = divergence_rows(student[keep] @ student_head.T, teacher[keep] @ teacher_head.T)
    loss = rows.mean()
    loss.backward()
    return loss.item()


def trl(student, student_head, teacher, teacher_head, labels):
    keep, _ = shift_for_next_token(labels)
    loss, *_ = _chunked_divergence_loss(student, teacher, student_head, teacher_head, keep, 0.0)
    loss.backward()
    return loss.item()


def trl_response(student, student_head, teacher, teacher_head, labels):
    supervised = int((labels != -100).sum())
    response = slice(-supervised - 1, -1)
    mask = torch.ones(1, supervised, device=labels.device)
    loss, *_ = _chunked_divergence_loss(
        student[:, response], teacher[:, response], student_head, teacher_head, mask, 0.0
    )
    loss.backward()
    return loss.item()


def authors(student, student_head, teacher, teacher_head, labels):
    student_logits, teacher_logits = student @ student_head.T, teacher @ teacher_head.T
    terms = F.softmax(teacher_logits, dim=-1) * F.log_softmax(student_logits, dim=-1)
    mask = (labels != -100).flatten()
    loss = -(terms.sum(-1).flatten() * mask).sum() / mask.sum()
    loss.backward()
    return loss.item()


# and how many times the positions
CONTENDERS = {
    "floor": (floor, 1),
    "ours": (ours, 1),
    "ours_4x": (ours, 4),
    "selection": (selection, 1),
    "trl_response": (trl_response, 1),
    "trl": (trl, 1),
    "authors": (authors, 1),
}
SLOW = ("trl", "authors")
BASES = ("floor", "selection", "trl_response", "trl", "authors")


def peak_memory(contender, args):
    """Highest size of this process above that of the inputs, in bytes."""
    function, times = CONTENDERS[contender]
    inputs = make_inputs(args, times * args.positions)
    if args.device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(**inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    function(**inputs)
    return resident("VmHWM") - before


def times_of(contenders, args, most=None):
    """`({name: [seconds]}, {name: loss})`; taken in turns, so that all of them see the same machine."""
    inputs = {
        times: make_inputs(args, times * args.positions) for times in {CONTENDERS[name][1] for name in contenders}
    }
    losses = {}

    def step(name):
        function, times = CONTENDERS[name]
        losses[name] = function(**inputs[times])

    def clear():
        for given in inputs.values():
            given["student"].grad = given["student_head"].grad = None

    return in_turns(
        {name: partial(step, name) for name in contenders},
        args.repeats,
        device=args.device,
        before=clear,
        most=most,
    ), losses


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(parser)
    parser.add_argument("--repeats", type=int, default=12, help="a quarter of it for the two slow ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=896, help="of the student")
    parser.add_argument("--teacher-width", type=int, default=1_536)
    parser.add_argument("--positions", type=int, default=704)
    parser.add_argument("--supervised", type=int, default=64)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--peak-of", choices=CONTENDERS, help=argparse.SUPPRESS)  # in a process of its own
    return parser


def main():
    args = options().parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        sys.stdout.write(str(peak_memory(args.peak_of, args)))
        return
    names = ["floor", *(name for name in args.only if name != "floor")]
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of"]
    peaks = {name: int(subprocess.run([*command, name], check=True, stdout=subprocess.PIPE).stdout) for name in names}
    times, losses = times_of(names, args, dict.fromkeys(SLOW, max(1, args.repeats // 4)))
    seconds = {name: statistics.median(each) for name, each in times.items()}
    sys.stdout.write(f"{'':>14} {'seconds':>9} {'x floor':>8} {'peak MiB':>9} {'loss':>9}\n")
    for name, each in seconds.items():
        loss = "" if losses[name] is None else f"{losses[name]:9.4f}"
        ratio, peak = each / seconds["floor"], peaks[name] / MIB
        sys.stdout.write(f"{name:>14} {each:9.3f} {ratio:8.2f} {peak:9.0f} {loss:>9}\n")
    if {"ours", "ours_4x"} <= seconds.keys():
        growth = (peaks["ours_4x"] - peaks["ours"]) / MIB
        added = 3 * args.positions * args.width * getattr(torch, args.dtype).itemsize / MIB
        sys.stdout.write(
            f"{3 * args.positions} more unsupervised positions: {growth:+.1f} MiB, of which {added:.1f} MiB are the "
            "gradient of their hidden states\n"
        )
    memory = [
        measured(
            f"{name}: peak memory", peak / MIB, "MiB", {base: peaks[base] / MIB for base in BASES if base in peaks}
        )
        for name, peak in peaks.items()
    ]
    write_json(
        args.json,
        __file__,
        [*rows_of(times, bases=BASES), *memory],
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
    )


if __name__ == "__main__":
    main()
