"""
Checks on one GPU what the tests check on a CPU, and writes `gpu_check.json` beside a table.

    python benchmarks/gpu_check.py [--out runs/gpu-check] [--device cuda] [--only losses attention] [--minutes 10]

Each line of the table is one number: what was measured, and the bound that it must not exceed; a number without a
bound is reported alone. A case that raises has failed, and the others go on. The exit code is 1 if any case failed. It
ends after `--minutes`, with the case that then runs. What the cases print, and how they failed, is in `gpu_check.log`.
`--device cpu` runs the same at smaller sizes, without what needs CUDA.
"""

import argparse
import contextlib
import json
import logging
import platform
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
import transformers
import trl
from gpu_checks import cuda, losses, models, training
from gpu_checks.cases import Skipped

CHECKS = {
    "losses": losses.mimic_cases,
    "preference_losses": losses.preference_cases,
    "experts": models.expert_cases,
    "attention": models.attention_cases,
    "generation": models.generation_cases,
    "gradients": training.gradient_cases,
    "accumulation": training.accumulation_cases,
    "checkpointing": training.checkpointing_cases,
    "memory": cuda.memory_cases,
    "speed": cuda.speed_cases,
    "stages": training.stage_cases,
    "fsdp2": cuda.fsdp2_cases,
    "compile": models.compile_cases,
}


def versions(device):
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.processor()
    return {
        "device": str(device),
        "name": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


@contextlib.contextmanager
def within(seconds):
    """Ends what runs inside it after so many seconds, as soon as Python runs again."""

    def end(*_):
        raise Skipped("no time left")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))  # 0 would be no limit
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rows_of(check, case, function, log, seconds):
    """Runs one case: a row for each number that it found, or one that says why there is none; `log` gets its output."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    row = {"check": check, "case": case}
    try:
        print(f"== {check} {case}", file=log, flush=True)
        with within(seconds), contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            found = function()
    except Skipped as reason:
        return [row | {"measured": str(reason), "bound": None, "passed": None}]
    except Exception as error:
        traceback.print_exc(file=log)
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        return [row | {"measured": text, "bound": None, "passed": False}]
    rows = []
    for part, value in found.items():
        value, bound = value if isinstance(value, tuple) else (value, None)
        # NaN is not below any bound
        passed = None if bound is None else bool(value <= bound)
        rows.append({**row, "part": part, "measured": value, "bound": bound, "passed": passed})
    return rows


def number(value):
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def line_of(row):
    verdict = {True: "ok", False: "FAILED", None: ""}[row["passed"]]
    name = f"{row['case']}: {row['part']}" if "part" in row else row["case"]
    return f"{row['check']:17} {name:60} {number(row['measured']):>10} {number(row['bound']):>8} {verdict}".rstrip()


def run(args):
    """The report; its file is written anew with every case, so that a run that is cut off leaves what it found."""
    report = {"machine": versions(args.device), "rows": []}
    args.out.mkdir(parents=True, exist_ok=True)
    print(" ".join(f"{name} {value}" for name, value in report["machine"].items()), flush=True)
    print(f"{'check':17} {'case':60} {'measured':>10} {'bound':>8}", flush=True)
    with (args.out / "gpu_check.log").open("w") as log:
        run_checks(args, report, log)
    return report


def run_checks(args, report, log):
    start, rows = time.perf_counter(), report["rows"]
    for check in args.only or CHECKS:
        began = time.perf_counter()
        for case, function in CHECKS[check](args.device):
            case_began = time.perf_counter()
            new = rows_of(check, case, function, log, start + 60 * args.minutes - case_began)
            for row in new:
                row["seconds"] = round(time.perf_counter() - case_began, 3)
                print(line_of(row), flush=True)
            rows += new
            report["seconds"] = round(time.perf_counter() - start, 1)
            report["failed"] = sum(row["passed"] is False for row in rows)
            (args.out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"{check}: {time.perf_counter() - began:.1f} s", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder for gpu_check.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="these checks alone")
    parser.add_argument("--minutes", type=float, default=10.0, help="it ends after them")
    args = parser.parse_args(argv)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is here: `--device cpu` tries the script without")
    report = run(args)
    passed = sum(row["passed"] is True for row in report["rows"])
    print(f"{passed} passed, {report['failed']} failed, {report['seconds']} s: {args.out}/gpu_check.json", flush=True)
    return int(report["failed"] > 0)


def quiet():
    """Warnings go, for the table's sake; a case that fails says so itself."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("llava_mod_hf").setLevel(logging.ERROR)
    torch._logging.set_logs(dynamo=logging.ERROR, inductor=logging.ERROR)


if __name__ == "__main__":
    quiet()
    sys.exit(main())
