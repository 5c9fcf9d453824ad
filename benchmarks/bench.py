"""
All speed benchmarks one after another, a process and a JSON file each, and two figures of what they found.

    python benchmarks/bench.py                                   # goes on where it was cut off
    python benchmarks/bench.py --only mimic_loss curves --again  # measures them anew
    python benchmarks/bench.py --page docs/speed.md              # figures and tables of the page, from the JSON alone

Files go to `--out`: a JSON per benchmark, `speed.png` and `curves.png`. What has a file from the same command is not
run again. One that fails does not stop the rest; the exit status is 1 then. For an idle machine: with two cores
40 minutes to two hours, by estimate.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from bench_figure import draw_curves, draw_speed
from bench_page import read_results, write_page
from measuring import command_of

HERE = Path(__file__).resolve().parent

# name of the result: script and its options
RUNS = {
    "startup": ("startup.py", "--rounds 3"),
    "mimic_loss": ("mimic_loss.py", "--repeats 8"),
    "mimic_step_tiny": ("mimic_step.py", "--size tiny --dtype float32 --repeats 10"),
    "mimic_step_0.5b": ("mimic_step.py", "--size qwen2-0.5b --layers 4 --repeats 3"),
    "multi_turn": ("multi_turn.py", "--conversations 1000"),
    "padding": ("padding.py", "--conversations 1000"),
    "data_loading": ("data_loading.py", "--pictures 64 --repeats 5"),
    "pictures_encoded": ("pictures_encoded.py", "--rounds 3 --threads 2"),
    "moe_block": ("moe_block.py", "--threads 2"),
    "preference_prefix": ("preference_prefix.py", "--rounds 5"),
    "preference_step": ("preference_step.py", "--rounds 3"),
    "teacher_cache": ("teacher_cache.py", "--rows 500"),
    "decoding": ("decoding.py", '--repeats 3 --tokens 8 --without "teacher of 7B\'s widths"'),
    "load_memory": ("load_memory.py", "--layers 4 --rounds 3"),
    "streaming_memory": ("streaming_memory.py", "--rows 2000 20000"),
    "curves": ("curves.py", "--rounds 3"),
}


def is_measured(path, script, options):
    """Whether a result is there, and of this command."""
    if not path.is_file():
        return False
    return json.loads(path.read_text(encoding="utf-8"))["command"] == command_of(script, shlex.split(options))


def run(name, out):
    """Whether a benchmark ended well, in a process of its own, and left its file."""
    script, options = RUNS[name]
    path = out / f"{name}.json.new"  # what was there before stays until there is better
    path.unlink(missing_ok=True)
    sys.stdout.write(f"{name}: {command_of(script, shlex.split(options))}\n")
    sys.stdout.flush()
    start = time.perf_counter()
    command = [sys.executable, str(HERE / script), *shlex.split(options), "--json", str(path)]
    code = subprocess.run(command, env={"HF_HUB_OFFLINE": "1", **os.environ}).returncode
    failed = f"failed with exit status {code}" if code else "" if path.is_file() else "wrote no file"
    sys.stdout.write(f"{name}: {failed or 'done'}, {time.perf_counter() - start:.0f} s\n\n")
    if not failed:
        os.replace(path, out / f"{name}.json")
    return not failed


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "speed")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="by default all")
    parser.add_argument("--again", action="store_true", help="run those that have a result too")
    parser.add_argument("--page", type=Path, help="write figures and tables of this page from `--out`, and run nothing")
    args = parser.parse_args(argv)
    unknown = [name for name in args.only or () if name not in RUNS]
    if unknown:
        raise SystemExit(f"There is no benchmark `{unknown[0]}`: give some of {', '.join(RUNS)}.")
    if args.page:
        write_page(args.out, args.page)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.only or RUNS:
        script, options = RUNS[name]
        if not args.again and is_measured(args.out / f"{name}.json", script, options):
            sys.stdout.write(f"{name}: there already\n")
        elif not run(name, args.out):
            failed.append(name)
    results = read_results(args.out)
    draw_speed(results, args.out / "speed.png")
    draw_curves(results, args.out / "curves.png")
    if failed:
        raise SystemExit(f"{len(failed)} of the benchmarks failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
