"""Memory, speed and FSDP2: what only a GPU can tell. On a CPU the same runs at toy sizes, so that it can be tried."""

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gpu_checks.cases import on_cuda, relative_error
from gpu_checks.models import expert_block, random_tokens
from gpu_checks.training import make_student
from llava_mod_hf import load_model_and_processor
from llava_mod_hf.losses.chunked_mimic import chunked_mimic_loss
from llava_mod_hf.losses.divergences import divergence_rows
from llava_mod_hf.losses.rows import Head, ProjectedRows
from llava_mod_hf.training.output_folder import save_checkpoint

ROOT = Path(__file__).parents[2]
MIB = 2**20
SIZES = {"cuda": (4096, 151_936, 896, 1536), "cpu": (64, 2048, 32, 48)}  # rows, vocabulary, widths


class Projections:
    """Hidden states and heads in bfloat16, whose logits have a standard deviation of about 2."""

    def __init__(self, device):
        rows, vocabulary, width, teacher_width = SIZES[torch.device(device).type]
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape, scale=1.0):
            return (scale * torch.randn(*shape, generator=generator, device=device)).bfloat16()

        self.hidden = randn(rows, width).requires_grad_()
        self.head = randn(vocabulary, width, scale=2 * width**-0.5).requires_grad_()
        self.teacher = randn(rows, teacher_width)
        self.teacher_head = randn(vocabulary, teacher_width, scale=2 * teacher_width**-0.5)
        self.targets = torch.zeros(rows, dtype=torch.long, device=device)

    def chunked(self):
        teachers = [ProjectedRows(self.teacher, Head(self.teacher_head))]
        chunked_mimic_loss(self.hidden, Head(self.head), self.targets, teachers).loss.backward()

    def plain(self):
        """All logits at once, by autograd."""
        divergence_rows(self.hidden @ self.head.T, self.teacher @ self.teacher_head.T).mean().backward()

    def products(self):
        """The four matrix products that nobody can avoid, the logits of a chunk of rows at a time."""
        with torch.no_grad():
            for start in range(0, len(self.hidden), 256):
                rows, theirs = self.hidden[start : start + 256], self.teacher[start : start + 256]
                logits = rows @ self.head.T
                theirs @ self.teacher_head.T
                logits @ self.head
                logits.T @ rows

    def clear(self):
        self.hidden.grad = self.head.grad = None


def peak_of(function, device):
    """MiB above what was there before; on a CPU it is not known."""
    if not on_cuda(device):
        function()
        return None
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def memory_found(device):
    given, gradients, peaks = Projections(device), {}, {}
    for name in ("chunked", "plain"):
        given.clear()
        peaks[name] = peak_of(getattr(given, name), device)
        gradients[name] = [given.hidden.grad, given.head.grad]
    errors = [relative_error(a, b) for a, b in zip(gradients["chunked"], gradients["plain"], strict=True)]
    found = {
        "gradient of hidden states": (errors[0], 0.02),
        "gradient of the head": (errors[1], 0.02),
    }
    if on_cuda(device):
        found |= {f"{name}, MiB": peak for name, peak in peaks.items()}
        found["chunked / plain"] = (peaks["chunked"] / peaks["plain"], 0.5)
    return found


def memory_cases(device):
    rows, vocabulary, width, _ = SIZES[torch.device(device).type]
    yield f"{rows} rows, V {vocabulary}, H {width}, bfloat16", lambda: memory_found(device)


# Speed


def milliseconds(function, device, repeats=5):
    """Median after two warm-ups; by events on a GPU."""
    times = []
    for _ in range(repeats + 2):
        if on_cuda(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def loss_speed(device):
    given = Projections(device)

    def step():
        given.clear()
        given.chunked()

    chunked, products = milliseconds(step, device), milliseconds(given.products, device)
    return {"chunked, ms": chunked, "four products, ms": products, "chunked / products": chunked / products}


def expert_speed(device, tokens):
    """Block forward and backward, with the experts of each implementation."""
    model, block = expert_block(torch.bfloat16, device)
    found = {}
    hidden = random_tokens(tokens, device, torch.bfloat16)

    def step():
        model.zero_grad(set_to_none=True)
        block(hidden).sum().backward()

    for name in ("eager", "grouped_mm"):
        model.set_experts_implementation(name)
        found[f"{name}, ms"] = milliseconds(step, device)
    return found | {"grouped_mm / eager": found["grouped_mm, ms"] / found["eager, ms"]}


def speed_cases(device):
    rows, vocabulary, width, _ = SIZES[torch.device(device).type]
    yield f"mimic loss, {rows} rows, V {vocabulary}, H {width}, bfloat16", lambda: loss_speed(device)
    for tokens in (704, 4096) if on_cuda(device) else (8,):
        yield f"experts, {tokens} tokens, bfloat16", lambda tokens=tokens: expert_speed(device, tokens)


# FSDP2


def launched(device):
    """Three steps under `accelerate launch` with one process; on a CPU without sharding."""
    cuda = on_cuda(device)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = ROOT / "recipes" / "accelerate" / ("fsdp2.yaml" if cuda else "single_gpu.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 1]
    command += ["--main_process_port", port] if cuda else ["--cpu"]
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_checkpoint(*make_student(sparse=True), folder / "student")
        command += [Path(__file__).with_name("fsdp2.py"), folder, torch.device(device).type]
        done = subprocess.run(
            [str(part) for part in command],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=180,
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error" in line]
            raise RuntimeError("\n".join([*errors[:1], done.stdout[-1000:], done.stderr[-6000:]]))
        found = json.loads((folder / "found.json").read_text())
        load_model_and_processor(str(folder / "saved"))  # which refuses weights that are missing
    return {
        "losses not finite": (sum(not math.isfinite(loss) for loss in found["losses"]), 0),
        "steps missing": (3 - len(found["losses"]), 0),
        "parameters in one piece": (found["whole"], 0) if cuda else found["whole"],
        "parameters trained": found["trained"],
        "kind": found["kind"],
    }


def fsdp2_cases(device):
    yield "accelerate launch, one process, mimic, bf16", lambda: launched(device)
