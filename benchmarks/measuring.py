"""
What the benchmarks of speed share: clocks, ways that take turns, and one shape of JSON.

`--json FILE` of each of them writes `{"benchmark", "command", "machine", "rows"}`, and a row is `{"name", "value",
"unit", "low", "high", "ratios": {base: {"value", "low", "high"}}}`: a median, and the least and the most of the rounds.
A ratio is the row's value over the base's, round by round, so that both have seen the same machine; below 1 is better.
"""

import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MIB = 2**20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PACKAGES = ("torch", "transformers", "trl")
BLOCKS = 10  # short runs are gathered into as many, else their range would be that of the system's interruptions


def add_json(parser):
    parser.add_argument("--json", type=Path, metavar="FILE", help="file that the figures are written to")


def seconds_of(step, device="cpu", clock="wall"):
    """Of one call: by the clock, or on a GPU between two events of its stream."""
    if not str(device).startswith("cuda"):
        start = CLOCKS[clock]()
        step()
        return CLOCKS[clock]() - start
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def in_turns(steps, rounds, *, device="cpu", clock="wall", before=None, most=None):
    """
    Args:
        steps (`dict[str, Callable]`): each is called once a round, after one round that warms up.
        before (`Callable`, *optional*): called before each of them, not timed.
        most (`dict[str, int]`, *optional*): rounds of those that take fewer, the first ones.

    Returns:
        `dict[str, list[float]]`: seconds of each round.
    """
    times = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            if number > (most or {}).get(name, rounds):
                continue
            if before is not None:
                before()
            seconds = seconds_of(step, device, clock)
            if number:
                times[name].append(seconds)
    return times


def products_of(step, model=None):
    """
    Multiplications with their additions that the matrix products of a step make, `{"all": …, "vision_tower": …}`; of a
    `model`, with transformers' `eager` experts, since torch looks into no operator of transformers' own.
    """
    from torch.utils.flop_counter import FlopCounterMode

    if model is not None:
        default = model.config.get_text_config()._experts_implementation
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        step()
    if model is not None:
        model.set_experts_implementation(default)
    by_module = {module: sum(counts.values()) / 2 for module, counts in counter.get_flop_counts().items()}
    vision = sum(count for module, count in by_module.items() if module.endswith(".vision_tower"))
    return {"all": counter.get_total_flops() / 2, "vision_tower": vision}


def square_product(dtype="float32", device="cpu", size=1024):
    """
    A matrix product of a size at which a machine is at its best, and its multiplications with their additions: seconds
    of it, for as many as a step has, are the step's floor. In float32 where that is faster: a CPU without instructions
    for bfloat16 emulates them.
    """
    import torch

    products = []
    for kind in dict.fromkeys([dtype, "float32"]):
        one, two = (torch.randn(size, size, device=device).to(dtype=getattr(torch, kind)) for _ in range(2))
        products.append(partial(torch.matmul, one, two))
    return min(products, key=lambda step: min(seconds_of(step, device) for _ in range(3))), size**3


def resident(name):
    """`VmRSS`, `VmHWM` or `RssAnon` of this process, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def blocks_of(values):
    """Values of at most 20 rounds as they are, more as medians of ten blocks of rounds in a row."""
    if len(values) <= 2 * BLOCKS:
        return list(values)
    edges = [len(values) * number // BLOCKS for number in range(BLOCKS + 1)]
    return [statistics.median(values[low:high]) for low, high in itertools.pairwise(edges)]


def spread(values):
    """`{"value", "low", "high"}`: the median of rounds, and their range."""
    digits = [float(f"{each:.5g}") for each in (statistics.median(values), *_range(values))]
    return dict(zip(("value", "low", "high"), digits, strict=True))


def _range(values):
    gathered = blocks_of(values)
    return min(gathered), max(gathered)


def measured(name, values, unit, bases=None, **more):
    """
    A row of the JSON.

    Args:
        values (`float` or `list[float]`): of each round, in `unit`; one number where nothing is repeated.
        bases (`dict[str, float or list[float]]`, *optional*): what it is compared with, of the same rounds and unit; a
            base of its own name is left out. Where one has fewer rounds, the first ones are compared.
        more: what else the row has, such as `curve` and `x`.
    """
    values = _many(values)
    ratios = {}
    for base, others in (bases or {}).items():
        if base != name:
            ratios[base] = spread([one / other for one, other in zip(values, _many(others), strict=False)])
    return {"name": name, **spread(values), "unit": unit, "ratios": ratios, **more}


def rows_of(times, unit="s", bases=None, **more):
    """Rows of all ways, each compared with all `bases`, names of ways, by default all of them."""
    names = [name for name in (times if bases is None else bases) if name in times]
    return [
        measured(name, values, unit, {base: times[base] for base in names}, **more) for name, values in times.items()
    ]


def _many(values):
    return list(values) if isinstance(values, list | tuple) else [values]


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device="cpu", dtype="float32", threads=None):
    """What the figures were measured on; `load` is of the minute before the end, and about `threads` if it was idle."""
    named = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    found = {
        "cpu": named[0].partition(":")[2].strip() if named else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
    }
    if str(device).startswith("cuda"):
        import torch

        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _lines(path):
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def command_of(script, argv=None):
    """The command line without `--json FILE`, and files by their names alone: it is read on other machines."""
    words = iter([str(word) for word in (sys.argv[1:] if argv is None else argv)])
    kept = []
    for word in words:
        if word == "--json":
            next(words, None)
        elif not word.startswith("--json="):
            kept.append(Path(word).name if os.path.isabs(word) else word)
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *kept])


def write(path, text):
    """Writes a file in one go, its folder first if it is not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path, script, rows, argv=None, **of_machine):
    """Writes the figures of a benchmark, if a file was asked for; `of_machine` are arguments of [`machine`]."""
    if path is not None:
        found = {
            "benchmark": Path(script).stem,
            "command": command_of(script, argv),
            "machine": machine(**of_machine),
            "rows": rows,
        }
        write(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
