"""Stages whose process is killed at moments that nobody chose, and that end as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from helpers.ddp_gradients import sharpened

ROOT = Path(__file__).parents[2]

RUN = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "dataset_name": "embedded:easy-vqa",
    "max_samples": 16,
}


def killed(tmp_path, jobs):
    """What [`helpers.killing`] finds of `{name: (argv, options, events, kills)}`."""
    spec = {}
    for number, (name, (command, options, missing, events, kills)) in enumerate(jobs.items()):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(options))
        argv = [*command, "--config", str(tmp_path / f"{name}.yaml"), missing]
        spec[name] = {"argv": argv, "events": events, "kills": kills, "seed": number}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    argv = [sys.executable, "-m", "helpers.killing", str(tmp_path / "spec.json")]
    process = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads((tmp_path / "killed.json").read_text())


def losses(folder):
    return [
        (log["step"], log["loss"])
        for log in json.loads((folder / "run.json").read_text())["log_history"]
        if "loss" in log
    ]


def check_run(folder, whole):
    folder, whole = Path(folder), Path(whole)
    expected, found = load_file(whole / "model.safetensors"), load_file(folder / "model.safetensors")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not expected[name].equal(found[name])] == []
    assert losses(folder) == losses(whole) and len(losses(folder)) == RUN["max_steps"]
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_change_nothing_of_what_two_stages_end_with(make_student, processor, tmp_path):
    models = {}
    for name, seed in (("student", 0), ("teacher", 1)):
        sharpened(make_student(moe_layers=[], seed=seed)).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        models[name] = str(tmp_path / name)
    mimic = {**RUN, **models, "dataset_config": "mixture"}
    cached = {**mimic, "output_dir": "unused"}
    events = {"step": 3, "checkpoint": 2, "end": 1}
    found = killed(
        tmp_path,
        {
            "cache": (["cache-teacher", "--shard_size", "4"], cached, "--teacher_cache", {"shard": 3}, 4),
            "mimic": (
                ["mimic", "--teacher_cache", "WHOLE/cache/0", "--moe_layers", "alternate"],
                mimic, "--output_dir", events, 8,
            ),
            "prefer": (["prefer"], {**RUN, **models, "dataset_config": "preferences"}, "--output_dir", events, 8),
        },
    )  # fmt: skip
    assert [len(each["moments"]) for each in found.values()] == [4, 8, 8]
    assert {moment[0] for each in found.values() for moment in each["moments"]} >= {"shard", "step", "checkpoint"}
    whole = Dataset.from_parquet(sorted(map(str, Path(found["cache"]["whole"]).glob("*.parquet")))).to_dict()
    for folder in found["cache"]["ended"]:
        assert Dataset.from_parquet(sorted(map(str, Path(folder).glob("*.parquet")))).to_dict() == whole
        assert {path.name for path in Path(folder).iterdir()} == {
            path.name for path in Path(found["cache"]["whole"]).iterdir()
        }
    for name in ("mimic", "prefer"):
        for folder in found[name]["ended"]:
            check_run(folder, found[name]["whole"])
