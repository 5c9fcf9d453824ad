"""What the tests of `cached_teacher` and their likes share."""

from datasets import load_dataset

from helpers.ddp_gradients import RUN
from llava_mod_hf import MimicConfig
from llava_mod_hf.commands.arguments import DistillArguments, UpcycleArguments
from llava_mod_hf.commands.cache_teacher import CacheCommand
from llava_mod_hf.commands.cache_teacher import run as run_cache_teacher
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.data.arguments import DataArguments

TEMPERATURE = 2.0


NUM_ROWS = 20


SEED = 0


ALL = 10**6  # more than any vocabulary


def mimic_config(folder, **options):
    arguments = {
        **RUN,
        "seed": SEED,
        "temperature": TEMPERATURE,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
    }
    return MimicConfig(output_dir=str(folder), **{**arguments, **options})


def recipe(models, folder, teacher="teacher", **options):
    """Argument groups of the mimic stage with a cache in `folder`."""
    return (
        DataArguments(dataset_name="embedded:easy-vqa", dataset_config="mixture", max_samples=NUM_ROWS),
        DistillArguments(student=models["student"], teacher=models[teacher], teacher_cache=str(folder)),
        UpcycleArguments(),
        mimic_config(folder.parent / "run", **options),
    )


def write(models, folder, teacher="teacher", *, options=None, **command):
    command = {"top_k": ALL, "log_probs_dtype": "float32", "shard_size": 8, **command}
    return run_cache_teacher(*recipe(models, folder, teacher, **(options or {})), CacheCommand(**command))


def read(folder):
    """By its files: `datasets` keeps what it once read of a folder by the folder's last name alone."""
    return load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train")


def train_rows():
    return easy_vqa.load("mixture", "train", SEED).select(range(NUM_ROWS))


def check_rows(teacher, rows):
    teacher._cache.check({}, rows)
