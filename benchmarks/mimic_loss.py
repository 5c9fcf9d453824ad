"""
Seconds and peak memory of the mimic loss, forward and backward, at the sizes of a Qwen2-0.5B student.

    python benchmarks/mimic_loss.py [--json FILE] [--repeats 12] [--threads 2]

One row of 704 positions (576 image tokens, 64 of a prompt, 64 of a supervised response), a vocabulary of 151,936,
widths 896 and 1,536, float32. Times are medians of runs in turns, so that all see the same machine. Memory, of a
process each, is the highest resident size above that of the inputs (hidden states and heads), gradients included: that
of the student's head alone is 519 MiB.

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
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from llava_mod_hf.losses.chunked_mimic import chunked_mimic_loss
from llava_mod_hf.losses.divergences import divergence_rows
from llava_mod_hf.losses.rows import Head, ProjectedRows, shift_for_next_token

VOCABULARY, STUDENT_WIDTH, TEACHER_WIDTH = 151_936, 896, 1_536
POSITIONS, SUPERVISED = 704, 64
MIB = 2**20


def make_inputs(positions):
    """Hidden states, heads and labels; heads scaled so that logits have a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator).mul_(scale)

    labels = torch.full((1, positions), -100)
    labels[:, -SUPERVISED:] = torch.randint(VOCABULARY, (1, SUPERVISED), generator=generator)
    return {
        "student": randn(1, positions, STUDENT_WIDTH).requires_grad_(),
        "student_head": randn(VOCABULARY, STUDENT_WIDTH, scale=2 * STUDENT_WIDTH**-0.5).requires_grad_(),
        "teacher": randn(1, positions, TEACHER_WIDTH),
        "teacher_head": randn(VOCABULARY, TEACHER_WIDTH, scale=2 * TEACHER_WIDTH**-0.5),
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
    response = slice(-SUPERVISED - 1, -1)
    mask = torch.ones(1, SUPERVISED)
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


CONTENDERS = {
    "floor": (floor, POSITIONS),
    "ours": (ours, POSITIONS),
    "ours_4x": (ours, 4 * POSITIONS),
    "selection": (selection, POSITIONS),
    "trl_response": (trl_response, POSITIONS),
    "trl": (trl, POSITIONS),
    "authors": (authors, POSITIONS),
}
SLOW = ("trl", "authors")


def resident(name):
    """`VmRSS` or `VmHWM`, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def peak_memory(contender, threads):
    """Highest resident size of this process above that of the inputs, in bytes."""
    torch.set_num_threads(threads)
    function, positions = CONTENDERS[contender]
    inputs = make_inputs(positions)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    function(**inputs)
    return resident("VmHWM") - before


def seconds_of(contenders, repeats):
    """`{name: (median seconds, loss)}`; taken in turns, so that all of them see the same machine."""
    inputs = {positions: make_inputs(positions) for positions in {CONTENDERS[name][1] for name in contenders}}
    seconds, losses = {name: [] for name in contenders}, {}
    for turn in range(repeats + 1):
        for name in contenders:
            function, positions = CONTENDERS[name]
            given = inputs[positions]
            if name in SLOW and turn > max(1, repeats // 4):
                continue
            given["student"].grad = given["student_head"].grad = None
            start = time.perf_counter()
            losses[name] = function(**given)
            seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(times[1:]), losses[name]) for name, times in seconds.items()}  # after a warm-up


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the figures are written to")
    parser.add_argument("--repeats", type=int, default=12, help="a quarter of it for the two slow ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--peak-of", choices=CONTENDERS, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.peak_of:
        sys.stdout.write(str(peak_memory(args.peak_of, args.threads)))
        return
    torch.set_num_threads(args.threads)
    names = ["floor", *(name for name in args.only if name != "floor")]
    command = [sys.executable, __file__, "--threads", str(args.threads), "--peak-of"]
    peaks = {name: int(subprocess.run([*command, name], check=True, stdout=subprocess.PIPE).stdout) for name in names}
    found = seconds_of(names, args.repeats)
    results = {
        name: {"seconds": s, "ratio": s / found["floor"][0], "peak_mib": peaks[name] / MIB, "loss": loss}
        for name, (s, loss) in found.items()
    }
    sys.stdout.write(f"{'':>14} {'seconds':>9} {'x floor':>8} {'peak MiB':>9} {'loss':>9}\n")
    for name, each in results.items():
        loss = "" if each["loss"] is None else f"{each['loss']:9.4f}"
        sys.stdout.write(f"{name:>14} {each['seconds']:9.3f} {each['ratio']:8.2f} {each['peak_mib']:9.0f} {loss:>9}\n")
    if {"ours", "ours_4x"} <= results.keys():
        growth = (peaks["ours_4x"] - peaks["ours"]) / MIB
        added = 3 * POSITIONS * STUDENT_WIDTH * 4 / MIB
        sys.stdout.write(
            f"{3 * POSITIONS} more unsupervised positions: {growth:+.1f} MiB, of which {added:.1f} MiB are the "
            "gradient of their hidden states\n"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
