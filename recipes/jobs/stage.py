# /// script
# requires-python = ">=3.10"
# dependencies = ["llava-mod-hf", "torchvision"]
# ///
"""
One stage on all GPUs of a job, with nothing set up before: what it needs is named above (PEP 723).

    uv run stage.py STAGE RECIPE [--launch NAME] [--key value ...]

`STAGE` is a command of `llava-mod`, `RECIPE` a YAML file or one that comes with the package, such as
`qwen2-0.5b/2_mimic_dense`; `--launch` a file of `recipes/accelerate`, by default `ddp`, or `single_gpu` where there is
one. Under Slurm each node runs this once, and all of them are one run.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from llava_mod_hf.recipes import packaged

PORT = 29500  # PyTorch's own default


def file_of(name, folder=""):
    """A file that is given by its path, or by its place among the recipes of the package."""
    inside = packaged("recipes", f"{folder}{name}.yaml")
    found = Path(name) if Path(name).is_file() else inside
    if not found.is_file():
        raise SystemExit(f"There is no file `{name}`, nor one of that name in `{inside.parent}`.")
    return str(found)


def nodes(environment):
    """Number of nodes, number of this one, and the first one's name, as Slurm says them."""
    count = int(environment.get("SLURM_NNODES", 1))
    if count == 1:
        return 1, 0, None
    names = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
    first = subprocess.run(names, check=True, capture_output=True, text=True).stdout.split()[0]
    return count, int(environment["SLURM_NODEID"]), first


def command(argv, *, gpus, environment):
    """The command line of `accelerate launch`."""
    if len(argv) < 2 or argv[0].startswith("-"):
        raise SystemExit(__doc__)
    stage, recipe, *options = argv
    count, node, first = nodes(environment)
    launch = "single_gpu" if gpus < 2 and count == 1 else "ddp"
    if "--launch" in options:
        place = options.index("--launch")
        launch = options[place + 1]
        del options[place : place + 2]
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    words += ["--config_file", file_of(launch, "accelerate/"), "--num_processes", str(max(gpus, 1) * count)]
    if count > 1:
        words += ["--num_machines", str(count), "--machine_rank", str(node)]
        words += ["--main_process_ip", first, "--main_process_port", environment.get("MASTER_PORT", str(PORT))]
    return [*words, "-m", "llava_mod_cli", stage, "--config", file_of(recipe), *options]


if __name__ == "__main__":
    words = command(sys.argv[1:], gpus=torch.cuda.device_count(), environment=os.environ)
    os.execv(words[0], words)  # no process between, so that a signal reaches the one that passes it on
