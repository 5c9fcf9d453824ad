"""
The recipes' launch configurations, two CPU processes each: they train what one process trains.

`make test-launched` runs these: DeepSpeed lies in a folder of its own. Steps are of plain gradient descent with a rate
of 1, so that what the weights have moved by is the gradient.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")

ROOT = Path(__file__).parents[2]
BY_GRADIENT = {
    "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0,
    "train_sampling_strategy": "sequential", "router_aux_loss_coef": 0, "max_steps": 1,
}  # fmt: skip
KINDS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
ROWS = 8  # of a step, over all processes


def run(command, recipe, processes=1, launch=None, **options):
    """Runs a stage of the tiny recipes, and returns what it printed."""
    options |= {"per_device_train_batch_size": ROWS // processes}
    words = [command, "--config", f"recipes/tiny/{recipe}.yaml"]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    start = [sys.executable, "-m", "llava_mod_cli"]
    if launch is not None:
        start = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
        start += [f"recipes/accelerate/{launch}.yaml", "--num_processes", str(processes), "--mixed_precision", "no"]
        start += ["--main_process_port", "0", "tests/helpers/launched.py"]
    paths = os.pathsep.join([str(ROOT / "src"), *sys.path])
    env = {**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def mimic(student, output_dir, **options):
    return run("mimic", "3_mimic_sparse", student=student, output_dir=output_dir, **options)


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A folder with an adapted student, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("one")
    run("adapt", "1_adapt", output_dir=folder / "adapt", max_steps=1)
    mimic(folder / "adapt", folder / "sparse", **BY_GRADIENT)
    run("prefer", "4_prefer", student=folder / "sparse", output_dir=folder / "prefer", **BY_GRADIENT)
    return folder


def assert_same_weights(found, expected, before):
    assert found.keys() == expected.keys()
    moved = max((expected[name] - before[name]).abs().max().item() for name in expected if name in before)
    assert moved > 1e-3, "these gradients are too small to tell anything apart"
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5 * max(moved, 1), msg=name)


@pytest.mark.parametrize(
    ("launch", "options"),
    [*((name, {}) for name in KINDS), ("fsdp2", {"shard_teacher": True})],
    ids=[*KINDS, "fsdp2 and the teacher"],
)
def test_a_sparse_student_learns_what_it_learns_in_one_process(one, tmp_path, launch, options):
    said = mimic(one / "adapt", tmp_path / "run", processes=2, launch=launch, **BY_GRADIENT, **options)
    assert f"2 processes as {KINDS[launch]}" in said
    assert_same_weights(weights(tmp_path / "run"), weights(one / "sparse"), weights(one / "adapt"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run", trust_remote_code=True)
    assert type(model).__name__ == "LlavaModForConditionalGeneration"
    assert {path.name for path in (tmp_path / "run").glob("*.py")} == {
        "configuration_llava_mod.py", "modeling_llava_mod.py", "moe_llava_mod.py"
    }  # fmt: skip


@pytest.mark.parametrize("launch", ["fsdp2", "zero3"])
def test_a_preference_step_is_that_of_one_process(one, tmp_path, launch):
    output = tmp_path / "run"
    said = run(
        "prefer", "4_prefer", student=one / "sparse", output_dir=output, processes=2, launch=launch, **BY_GRADIENT
    )
    assert f"2 processes as {KINDS[launch]}" in said
    assert_same_weights(weights(output), weights(one / "prefer"), weights(one / "sparse"))


@pytest.mark.parametrize("launch", ["fsdp2", "zero3"])
def test_a_run_that_was_cut_off_ends_where_it_would_have(one, tmp_path, launch):
    options = {"processes": 2, "launch": launch, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    mimic(one / "adapt", tmp_path / "run", **options)
    whole = weights(tmp_path / "run")
    for path in (tmp_path / "run").iterdir():
        if path.name == "checkpoint-2":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    mimic(one / "adapt", tmp_path / "run", **options)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    taken_up = weights(tmp_path / "run")
    assert taken_up.keys() == whole.keys()
    assert all(torch.equal(taken_up[name], whole[name]) for name in whole)
