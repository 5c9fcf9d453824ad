"""Trainers that read a frozen encoder's features from disk: the same losses and gradients, and no second encoding."""

import errno
import logging
import shutil
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

from helpers.ddp_gradients import RawGradients, gradients_of_two_processes, raw_gradients, rows
from helpers.trainers import ONE_FAST, TRAINERS
from llava_mod_hf import MimicConfig, PreferenceConfig, recipes
from llava_mod_hf.data.held_out import count_pictures
from llava_mod_hf.teachers import vision_cache
from llava_mod_hf.training.adapt_config import AdaptConfig

CONFIGS = {"adapt": AdaptConfig, "mimic": MimicConfig, "prefer": PreferenceConfig}
OPTIONS = {"train_modules": ["adaptor", "language_model"], "learning_rate": 1e-2, "batch": 2}
TWO_EPOCHS = {**OPTIONS, "max_steps": -1, "num_train_epochs": 2}


def mixed(config="mixture"):
    """A row without a picture, one with two, and two of one picture, in batches of two."""
    dataset = rows(config)
    pictures = [row[0] for row in dataset["images"][:]]
    kinds = [[], [pictures[1], pictures[0]], [pictures[2]], [pictures[2]]]
    return dataset.map(lambda row, index: {"images": kinds[index]}, with_indices=True)


def encoded(model):
    """Pictures of each run of the encoder from now on."""
    seen = []
    model.model.vision_tower.embeddings.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def files(folder):
    return sorted(folder.glob("*/*/*.safetensors"))


def run(stage, models, processor, folder, **options):
    """The trainer, its gradients and losses of each step, and the pictures that student and teacher encoded."""
    student, teacher = models()
    seen, callback = [encoded(student), encoded(teacher)], RawGradients()
    options = {**TWO_EPOCHS, "dataset": mixed("preferences" if stage == "prefer" else "mixture"), **options}
    trainer = TRAINERS[stage](student, teacher, processor, folder, callbacks=[callback], **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, callback.steps, losses, seen


def assert_same(found, expected):
    """Bit for bit."""
    (_, steps, losses, _), (_, expected_steps, expected_losses, _) = found, expected
    assert losses == expected_losses and len(steps) == len(expected_steps) == 4
    for step, other in zip(steps, expected_steps, strict=True):
        assert step.keys() == other.keys() and all(step[name].equal(other[name]) for name in other)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("stage", ONE_FAST)
def test_the_same_steps_and_pictures_are_encoded_once(models, processor, tmp_path, stage, bf16):
    cache = tmp_path / "cache"
    plain = run(stage, models, processor, tmp_path / "plain", bf16=bf16)
    first = run(stage, models, processor, tmp_path / "first", bf16=bf16, vision_cache=str(cache))
    later = run(stage, models, processor, tmp_path / "later", bf16=bf16, vision_cache=str(cache))
    assert_same(first, plain)
    assert_same(later, plain)
    teachers = 0 if stage == "adapt" else 1
    # of the second batch one picture, and nothing of the second epoch
    assert first[3] == [[2, 1], [2, 1] * teachers]
    assert plain[3] == [[2, 1, 2, 1], [2, 1, 2, 1] * teachers]
    assert later[3] == [[], []]
    kept = files(cache)
    assert len(kept) == 3 * (1 + teachers) and len([*cache.glob("*/encoder.json")]) == 1 + teachers
    with safe_open(kept[0], framework="pt") as file:
        (name,) = file.keys()
        states = file.get_tensor(name)
    assert (name, states.dtype, states.shape) == ("-1", torch.bfloat16 if bf16 else torch.float32, (32, 16))


def test_a_shared_encoder_is_cached_once(models, processor, tmp_path):
    def shared():
        student, teacher = models()
        teacher.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
        return student, teacher.bfloat16()  # which reads the student's more precise features, rounded

    plain = run("mimic", shared, processor, tmp_path / "plain")
    first = run("mimic", shared, processor, tmp_path / "first", vision_cache=str(tmp_path / "cache"))
    later = run("mimic", shared, processor, tmp_path / "later", vision_cache=str(tmp_path / "cache"))
    assert_same(first, plain)
    assert_same(later, plain)
    assert (first[3], later[3]) == ([[2, 1], []], [[], []])
    assert len(files(tmp_path / "cache")) == 3


def test_later_stages_and_other_ways_of_reading_find_the_pictures(models, processor, tmp_path):
    cache = str(tmp_path / "cache")
    run("adapt", models, processor, tmp_path / "adapt", vision_cache=cache)
    _, _, _, (student, teacher) = run("mimic", models, processor, tmp_path / "mimic", vision_cache=cache)
    assert (student, teacher) == ([], [2, 1])
    _, _, _, (student, teacher) = run("adapt", models, processor, tmp_path / "bf16", vision_cache=cache, bf16=True)
    assert student == [2, 1], "features of another precision"

    def other():
        models_ = models()
        models_[0].model.vision_tower.encoder.layers[0].mlp.fc1.bias.data[0] += 1
        return models_

    _, _, _, (student, _) = run("adapt", other, processor, tmp_path / "other", vision_cache=cache)
    assert student == [2, 1], "features of another encoder"


def test_a_model_that_goes_on_without_the_option_reads_no_cache(models, processor, tmp_path):
    trainer, *_ = run("adapt", models, processor, tmp_path / "first", vision_cache=str(tmp_path / "cache"))
    seen, student = encoded(trainer.model), trainer.model
    trainer.evaluate(rows())
    before = [*seen]
    run("adapt", lambda: (student, student), processor, tmp_path / "next")
    assert seen[len(before) :][:4] == [2, 1, 2, 1]


def test_encoder_that_is_loaded_into_the_trainer_is_another_one(models, processor, tmp_path):
    """As when a checkpoint is taken up whose encoder is not the one that the trainer was made with."""
    trainer, *_ = run("adapt", models, processor, tmp_path / "run", vision_cache=str(tmp_path / "cache"))
    seen, tower = encoded(trainer.model), trainer.model.model.vision_tower
    tower.load_state_dict({name: value + 0.1 for name, value in tower.state_dict().items()})
    trainer.evaluate(mixed())
    assert seen == [3] and len(files(tmp_path / "cache")) == 6


def test_a_resumed_run_ends_at_the_same_weights(models, processor, tmp_path):
    options = {**OPTIONS, "max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    cached = {**options, "vision_cache": str(tmp_path / "cache")}
    folder = tmp_path / "run" / "checkpoint-4"
    expected = {}
    for again in (False, True):
        student, teacher = models()
        seen = encoded(student)
        trainer = TRAINERS["mimic"](student, teacher, processor, tmp_path / "run", dataset=mixed(), **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3") if again else None)
        assert trainer.state.global_step == 4
        found = load_file(folder / "model.safetensors")
        expected = expected or found
        shutil.rmtree(folder)
        options = cached  # which a run may be taken up with
    assert seen == [1] and all(found[name].equal(value) for name, value in expected.items())


def test_a_full_disk_is_said_once_and_the_run_goes_on(models, processor, tmp_path, monkeypatch, caplog):
    plain = run("mimic", models, processor, tmp_path / "plain")
    save, calls = vision_cache.save_file, []

    def full(tensors, path):
        calls.append(path)
        Path(path).write_bytes(b"half")
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(vision_cache, "save_file", full)
    with caplog.at_level(logging.WARNING):
        found = run("mimic", models, processor, tmp_path / "full", vision_cache=str(tmp_path / "cache"))
    assert_same(found, plain)
    told = [record.getMessage() for record in caplog.records if "`vision_cache`" in record.getMessage()]
    assert len(told) == 1 and "No space left on device" in told[0] and "the run goes on" in told[0]
    assert len(files(tmp_path / "cache")) == 1 and not [*tmp_path.glob("cache/**/.*")]
    assert len(calls) == 2 and found[3] == [[2, 1, 1, 1], [2, 1, 2, 1]]


def test_no_file_is_written_where_little_is_left(models, processor, tmp_path, monkeypatch, caplog):
    run("adapt", models, processor, tmp_path / "run", vision_cache=str(tmp_path / "cache"))
    monkeypatch.setattr(vision_cache, "RESERVE", 2**60)
    with pytest.raises(ValueError, match=r"`vision_cache` takes 6.14e-06 GB more for 3 pictures, and 0 GB are free at"):
        run("adapt", models, processor, tmp_path / "next", vision_cache=str(tmp_path / "other"))
    run("adapt", models, processor, tmp_path / "next", vision_cache=str(tmp_path / "cache"))  # which has all of them
    dataset = IterableDataset.from_generator(lambda: iter(mixed()))  # of which nobody knows how many come
    options = {"dataset": dataset, "max_steps": 2, "vision_cache": str(tmp_path / "other")}
    _, _, _, (student, _) = run("adapt", models, processor, tmp_path / "stream", **options)
    assert student == [2, 1] and not files(tmp_path / "other")
    assert "GB of the disk are left for the rest" in caplog.text


@pytest.mark.parametrize("stage", list(CONFIGS))
def test_what_is_no_folder_is_refused_by_the_config_and_in_a_recipe(stage, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    recipe = tmp_path / "recipe.yaml"
    for value, told in (
        (tmp_path / "file", "file` is no folder that can be written: give another folder"),
        (tmp_path / "file" / "cache", "file` is no folder that can be written"),
        (tmp_path / ("x" * 300), "is no folder that can be written"),
        ("", "`vision_cache` is '': give a folder, or leave it out"),
    ):
        with pytest.raises(ValueError, match=told):
            CONFIGS[stage](str(tmp_path / "out"), use_cpu=True, bf16=False, vision_cache=str(value))
        recipe.write_text(f"output_dir: {tmp_path / 'out'}\nuse_cpu: true\nbf16: false\nvision_cache: '{value}'\n")
        with pytest.raises(ValueError, match=told):
            recipes.parse([CONFIGS[stage]], ["--config", str(recipe)])
    with pytest.raises(ValueError, match=r"frozen encoder, and `train_modules` is \['vision_tower'\]"):
        CONFIGS[stage](
            str(tmp_path / "out"), use_cpu=True, bf16=False, vision_cache=str(tmp_path), train_modules=["vision_tower"]
        )
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=f"`{tmp_path}` is no folder that can be written"):
        CONFIGS[stage](str(tmp_path / "out"), use_cpu=True, bf16=False, vision_cache=str(tmp_path / "cache"))


@pytest.mark.parametrize("stage", list(TRAINERS))
def test_what_cannot_be_kept_is_refused(models, processor, tmp_path, stage):
    def trainer(student, teacher, **options):
        return TRAINERS[stage](
            student, teacher, processor, tmp_path, **{**OPTIONS, "vision_cache": str(tmp_path / "cache"), **options}
        )

    student, teacher = models()
    student.model.vision_tower.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="draws others each time .*`attention_dropout` 0.1.: leave it out"):
        trainer(student, teacher)
    student, teacher = models()
    with pytest.raises(ValueError, match=r"8 tensors of this one are trained \(`.*lora_A.*freeze the encoder"):
        trainer(get_peft_model(student, LoraConfig(target_modules=["q_proj", "k_proj"])), teacher, train_modules=None)
    with pytest.raises(ValueError, match="where nothing can be written"):
        trainer(*models(), vision_cache="/proc/cache")
    student, teacher = models()
    student.name_or_path = "somewhere"  # which an adapter's folder names
    adapted = trainer(student, teacher, use_peft=True, train_modules=None, lora_target=["attention"])
    assert raw_gradients(adapted) and files(tmp_path / "cache")


def test_sharded_and_other_models_are_refused(models, trainer_of, monkeypatch):
    from llava_mod_hf.training import cached_features

    folder = str(Path(trainer_of.__code__.co_filename).parent)
    sharded = trainer_of(*models(), train_modules=["adaptor"])
    sharded.args.vision_cache, sharded.is_fsdp_enabled = folder, True
    with pytest.raises(ValueError, match="which FSDP2 and ZeRO-3 spread over all of them"):
        cached_features.use_vision_cache(sharded)
    monkeypatch.setattr(cached_features, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="which FSDP2 and ZeRO-3 spread over all of them"):
        trainer_of(*models(), train_modules=["adaptor"], vision_cache=folder)
    other = torch.nn.Module()
    other.base_model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="and the student is a Module: leave it out"):
        vision_cache.check_cacheable(other)


@pytest.mark.slow
def test_two_processes_share_a_cache(models, processor, tmp_path):
    student, teacher = models()
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    found = gradients_of_two_processes(tmp_path, modes=["cache"])
    for name, value in found["without"].items():
        assert found["written"][name].equal(value) and found["read"][name].equal(value), name
    assert (found["pictures without"], found["pictures written"], found["pictures read"]) == (4, 4, 0)
    assert len(files(tmp_path / "cache")) == 2 * count_pictures(rows()), "the student's and the teacher's"
