"""`recipes/jobs/`: what a job is started by, built for each machine, and run on this one."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "recipes" / "jobs"


@pytest.fixture(scope="module")
def job():
    return runpy.run_path(str(JOBS / "stage.py"))


def launched(job, *argv, gpus=1, **environment):
    """`(options of accelerate, words from the module on)`."""
    words = job["command"](list(argv), gpus=gpus, environment=environment)
    place = words.index("-m", 2)
    assert words[:4] == [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    return dict(zip(words[4:place:2], words[5:place:2], strict=True)), words[place:]


def test_what_a_script_needs_is_named_in_it():
    lines = (JOBS / "stage.py").read_text().splitlines()
    start, end = lines.index("# /// script"), lines.index("# ///")
    needs = tomllib.loads("\n".join(line.removeprefix("# ") for line in lines[start + 1 : end]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert needs["requires-python"] == project["requires-python"]
    assert project["name"] in needs["dependencies"]


@pytest.mark.parametrize(("gpus", "launch", "processes"), [(0, "single_gpu", 1), (1, "single_gpu", 1), (8, "ddp", 8)])
def test_a_machine_has_a_process_for_each_gpu(job, gpus, launch, processes):
    options, words = launched(job, "mimic", "qwen2-0.5b/2_mimic_dense", "--seed", "1", gpus=gpus)
    assert options == {
        "--config_file": str(ROOT / "recipes" / "accelerate" / f"{launch}.yaml"),
        "--num_processes": str(processes),
    }
    recipe = str(ROOT / "recipes" / "qwen2-0.5b" / "2_mimic_dense.yaml")
    assert words == ["-m", "llava_mod_cli", "mimic", "--config", recipe, "--seed", "1"]


def test_nodes_of_slurm_are_one_run(job, monkeypatch, tmp_path):
    fake = tmp_path / "scontrol"
    fake.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "MASTER_PORT": "4567"}
    options, words = launched(job, "prefer", "qwen2-0.5b/4_prefer", "--launch", "fsdp2", gpus=4, **slurm)
    assert Path(options.pop("--config_file")).name == "fsdp2.yaml"
    assert options == {
        "--num_processes": "8", "--num_machines": "2", "--machine_rank": "1",
        "--main_process_ip": "n1", "--main_process_port": "4567",
    }  # fmt: skip
    assert "--launch" not in words
    one_gpu, _ = launched(job, "prefer", "qwen2-0.5b/4_prefer", gpus=1, **slurm)
    assert Path(one_gpu["--config_file"]).name == "ddp.yaml"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["mimic"], "uv run stage.py STAGE RECIPE"),
        (["mimic", "qwen3/2_mimic"], "There is no file `qwen3/2_mimic`, nor one of that name"),
        (["mimic", "tiny/1_adapt", "--launch", "zero4"], "There is no file `zero4`"),
    ],
)
def test_what_is_not_there_is_told(job, argv, told):
    with pytest.raises(SystemExit, match=told):
        job["command"](argv, gpus=1, environment={})


def test_the_sbatch_file_runs_the_script_once_a_node():
    text = (JOBS / "stage.sbatch").read_text()
    subprocess.run(["bash", "-n", JOBS / "stage.sbatch"], check=True)
    assert "#SBATCH --ntasks-per-node=1\n" in text and "#SBATCH --requeue\n" in text
    assert 'exec srun uv run recipes/jobs/stage.py "$@"' in text


@pytest.mark.slow
def test_a_stage_runs_as_a_job(tmp_path):
    options = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "adapt")]
    done = subprocess.run(
        [sys.executable, JOBS / "stage.py", "adapt", "tiny/1_adapt", *options],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapt" / "model.safetensors").is_file()
