"""Writing a cache of a teacher's answers: resumed, shared out, pushed, refused."""

import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import yaml
from transformers import AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import llava_mod_cli
from helpers.cached_teacher_cases import ALL, NUM_ROWS, SEED, TEMPERATURE, check_rows, read, recipe, train_rows, write
from helpers.ddp_gradients import RUN
from helpers.hub_server import HubServer
from llava_mod_hf.commands import cache_teacher
from llava_mod_hf.commands.cache_teacher import CacheCommand
from llava_mod_hf.publishing.manifest import MANIFEST_FILE
from llava_mod_hf.teachers.cached_teacher import CachedTeacher

pytestmark = pytest.mark.usefixtures("rows_read_once")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".parquet", ".yaml")}


def test_a_run_that_was_killed_goes_on_and_equals_an_uninterrupted_one(models, caches, tmp_path, monkeypatch):
    folder, batches = tmp_path / "cache", []

    class Killed(BaseException):
        pass

    original = cache_teacher.TeacherWriter._collate

    def collate(self, numbers):
        batches.append(numbers)
        if len(batches) == 4:  # in the middle of the second shard of 8 rows
            raise Killed
        return original(self, numbers)

    monkeypatch.setattr(cache_teacher.TeacherWriter, "_collate", collate)
    with pytest.raises(Killed):
        write(models, folder)
    assert sorted(contents(folder)) == ["shards.yaml", "train-00000-of-00003.parquet"]
    assert not (folder / "README.md").exists()
    with pytest.raises(ValueError, match="lacks 2 of 3 shards"):
        CachedTeacher(str(folder))
    with pytest.raises(ValueError, match="another|begun with"):  # not with other options
        write(models, folder, top_k=3)
    batches[:] = [None] * 4
    write(models, folder)
    assert len(batches) == 4 + 3  # rows 8 to 19 alone
    assert contents(folder) == contents(caches["teacher"])
    assert (folder / "README.md").is_file()


def test_parts_written_by_several_processes_are_the_whole(models, caches, tmp_path):
    folder = tmp_path / "cache"
    write(models, folder, shard=1, num_shards=2)
    assert sorted(contents(folder)) == ["shards.yaml", "train-00001-of-00003.parquet"]
    write(models, folder, shard=0, num_shards=2)
    assert contents(folder) == contents(caches["teacher"])


def test_without_a_terminal_no_bar_is_drawn(models, tmp_path, capsys):
    write(models, tmp_path / "cache", options={"disable_tqdm": False})
    assert "Rows from" not in capsys.readouterr().err


@pytest.mark.slow
def test_launched_processes_share_the_work(models, caches, tmp_path):
    folder = tmp_path / "cache"
    groups = recipe(models, folder)
    values = {
        "dataset_name": "embedded:easy-vqa",
        "dataset_config": "mixture",
        "max_samples": NUM_ROWS,
        "student": models["student"],
        "teacher": models["teacher"],
        "teacher_cache": str(folder),
        "output_dir": groups[-1].output_dir,
        "ddp_backend": "gloo",
        **{**RUN, "seed": SEED, "temperature": TEMPERATURE, "per_device_train_batch_size": 4},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "llava_mod_cli", "cache-teacher", "--config", str(tmp_path / "recipe.yaml")]
    command += ["--top_k", str(ALL), "--log_probs_dtype", "float32", "--shard_size", "8"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert ["Wrote 2 shards" in said[0], "Wrote 1 shards" in said[1]] == [True, True]
    found, expected = read(folder), read(caches["teacher"])
    assert found["key"][:] == expected["key"][:]
    # another number of threads rounds otherwise, and may swap tokens that are as likely
    for row, other in zip(found["log_probs"], expected["log_probs"], strict=True):
        np.testing.assert_allclose(row, other, atol=1e-4)


def test_pushed_to_the_hub_and_trained_from_there(models, caches, hub: HubServer, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(caches["teacher"], folder)
    (folder / ".shards.yaml.0.part").touch()  # left by a run that was killed
    write(models, folder, push_to="me/answers", private=True)
    files = hub.repos["me/answers"].branches["main"].files
    shards = [f"train-0000{index}-of-00003" for index in range(3)]
    assert sorted(files) == sorted(
        [".gitattributes", MANIFEST_FILE, "README.md", "shards.yaml"]
        + [f"{shard}.parquet" for shard in shards]
        + [f"checksum-{shard}.b2sum" for shard in shards]
    )
    assert hub.repos["me/answers"].private
    teacher = CachedTeacher("me/answers")
    check_rows(teacher, train_rows())
    assert teacher.settings == yaml.safe_load((folder / "shards.yaml").read_text())
    (folder / "weights.bin").touch()
    with pytest.raises(ValueError, match="weights.bin"):
        write(models, folder, push_to="me/answers")


def test_rows_longer_than_the_context_are_left_out_as_the_stage_does(models, tmp_path):
    processor = AutoProcessor.from_pretrained(models["student"])
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    lengths = [int(collator([dict(row)])["attention_mask"].sum()) for row in train_rows()]
    longest = sorted(lengths)[NUM_ROWS // 2]
    folder = write(models, tmp_path / "cache", top_k=2, options={"max_length": longest})
    assert len(read(folder)) == sum(length <= longest for length in lengths) < NUM_ROWS


@pytest.mark.parametrize(
    "wrong", [{"top_k": 0}, {"shard_size": 0}, {"log_probs_dtype": "int8"}, {"shard": 1}, {"shard": 2, "num_shards": 2}]
)
def test_options_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CacheCommand(**wrong)


def test_a_recipe_without_a_cache_is_refused(models, tmp_path, capsys):
    arguments = ["--dataset_name", "embedded:easy-vqa", "--student", "s", "--teacher", "t", "--use_cpu", "true"]
    assert llava_mod_cli.main(["cache-teacher", *arguments, "--output_dir", str(tmp_path), "--bf16", "false"]) == 2
    assert "teacher_cache" in capsys.readouterr().err
