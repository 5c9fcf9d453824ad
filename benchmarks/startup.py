"""
How long the command line lets one wait, as ratios to `import transformers` and to `trl sft --help`.

    python benchmarks/startup.py [--rounds 5] [--only NAME ...] [--json FILE]

Each line is a fresh process. The lines are interleaved, in another order each round, and the first round, which fills
the disk's cache and Python's, is not counted; what is shown is the median of the others. On a machine that does other
work, the ratios hold better than the seconds.
"""

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measuring import add_json, rows_of, write_json

BIN = Path(sys.executable).parent

OURS = [sys.executable, "-m", "llava_mod_cli"]

LINES = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import transformers": [sys.executable, "-c", "import transformers"],
    "trl sft --help": [str(BIN / "trl"), "sft", "--help"],
    "trl --help": [str(BIN / "trl"), "--help"],
    "llava-mod --help": [*OURS, "--help"],
    "llava-mod mimc": [*OURS, "mimc"],  # a mistyped command
    "llava-mod adapt --help": [*OURS, "adapt", "--help"],
    "llava-mod mimic --help": [*OURS, "mimic", "--help"],
    "llava-mod prefer --help": [*OURS, "prefer", "--help"],
}

BASES = ("import transformers", "trl sft --help")
RATIOS = (*BASES, "python -c pass", "trl --help")  # in the JSON


def seconds_of(command):
    """Wall-clock time of a process that has to answer as it should: 0, or 2 after a mistyped command."""
    started = time.perf_counter()
    process = subprocess.run(command, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    seconds = time.perf_counter() - started
    if process.returncode not in (0, 2) or b"Traceback" in process.stderr:
        raise RuntimeError(f"`{' '.join(command)}` ended with {process.returncode}: {process.stderr.decode()[-500:]}")
    return seconds


def measure(names, rounds):
    """`{name: [seconds]}` of the rounds that count."""
    found = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in random.Random(number).sample(names, len(names)):
            seconds = seconds_of(LINES[name])
            if number:
                found[name].append(seconds)
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of all lines, after one that is not counted")
    parser.add_argument("--only", nargs="+", choices=list(LINES), default=list(LINES), metavar="NAME")
    add_json(parser)
    args = parser.parse_args(argv)
    names = [name for name in args.only if shutil.which(LINES[name][0])]
    found = measure(names, args.rounds)
    write_json(args.json, __file__, rows_of(found, bases=RATIOS), argv)
    medians = {name: statistics.median(values) for name, values in found.items()}
    bases = [base for base in BASES if base in medians]
    lines = ["| | seconds | fastest–slowest |" + "".join(f" × `{base}` |" for base in bases)]
    lines.append("|---|---:|---:|" + "---:|" * len(bases))
    for name, seconds in medians.items():
        ratios = "".join(f" {seconds / medians[base]:.2f} |" for base in bases)
        lines.append(f"| `{name}` | {seconds:.2f} | {min(found[name]):.2f}–{max(found[name]):.2f} |{ratios}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
