"""The reference of pairs, computed once: equal to the live one, resumable, refused when of another making."""

import dataclasses
import functools
import shutil

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

import llava_mod_cli
from helpers.ddp_gradients import RUN, assert_gradients_close, raw_gradients, sharpened
from helpers.preference_trainers import log_probabilities, uneven
from llava_mod_hf import PreferenceConfig, PreferenceTrainer
from llava_mod_hf.commands import cache_reference, prefer, stage_parts
from llava_mod_hf.commands.arguments import DistillArguments
from llava_mod_hf.commands.cache_reference import ReferenceCommand
from llava_mod_hf.commands.cache_reference import run as run_cache_reference
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.teachers.reference_model import REFERENCE_COLUMNS, TAIL_COLUMNS, CachedReference, pair_collator

NUM_ROWS = 12


@pytest.fixture(scope="module", autouse=True)
def pairs_of_uneven_answers():
    """The embedded pairs, whose answers are as long as one another, with every other rejected one made longer."""
    plain = easy_vqa.load

    @functools.cache
    def load(config, split, seed=0):
        return uneven(plain(config, split, seed).select(range(2 * NUM_ROWS)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(easy_vqa, "load", load)
        yield


@pytest.fixture(scope="module")
def models(make_student, make_teacher, processor, tmp_path_factory):
    """Folders of a student, of a teacher that reads the same tensors, and of one with its own images and template."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 0), ("teacher", 1)):
        sharpened(make_student(moe_layers=[], seed=seed)).save_pretrained(root / name)
        processor.save_pretrained(root / name)
    model, teacher_processor = make_teacher()
    model.save_pretrained(root / "foreign")
    teacher_processor.save_pretrained(root / "foreign")
    return {path.name: str(path) for path in root.iterdir()}


def groups(models, cache, output_dir, teacher="teacher", **options):
    """Argument groups of the stage."""
    arguments = {
        **RUN,
        "seed": 0,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "random",
        "loss_type": ["sigmoid"],
    }
    return (
        DataArguments(dataset_name="embedded:easy-vqa", dataset_config="preferences", max_samples=NUM_ROWS),
        DistillArguments(
            student=models["student"], teacher=models[teacher], teacher_cache=None if cache is None else str(cache)
        ),
        PreferenceConfig(output_dir=str(output_dir), **{**arguments, **options}),
    )


def write(models, folder, teacher="teacher", **command):
    return run_cache_reference(
        *groups(models, folder, folder.parent / "run", teacher), ReferenceCommand(**{"shard_size": 5, **command})
    )


@pytest.fixture(scope="module")
def caches(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    return {name: write(models, root / name, name) for name in ("teacher", "foreign")}


def test_without_a_terminal_no_bar_is_drawn(models, tmp_path, capsys):
    cache = tmp_path / "cache"
    run_cache_reference(*groups(models, cache, tmp_path / "run", disable_tqdm=False), ReferenceCommand())
    assert "Pairs from" not in capsys.readouterr().err


def columns(folder):
    rows = load_dataset("parquet", data_files=sorted(map(str, folder.glob("*.parquet"))), split="train")
    return rows.sort("row").to_dict()


def test_two_numbers_per_pair_are_the_sums_of_the_log_probabilities(models, caches):
    found = columns(caches["foreign"])
    assert found.keys() == {"key", "row", *REFERENCE_COLUMNS, *TAIL_COLUMNS} and len(found["row"]) == NUM_ROWS
    teacher, processor = load_model_and_processor(models["foreign"])
    rows = easy_vqa.load("preferences", "train", 0)
    with torch.no_grad():
        for number in (0, NUM_ROWS - 1):
            chosen, rejected = log_probabilities(teacher, pair_collator(processor)([rows[number]]))[0].tolist()
            assert found[REFERENCE_COLUMNS[0]][number] == pytest.approx(chosen, abs=1e-4)
            assert found[REFERENCE_COLUMNS[1]][number] == pytest.approx(rejected, abs=1e-4)


def test_the_prompt_of_a_pair_is_computed_once(models, caches, tmp_path, monkeypatch):
    """Unless `share_prefix` is off: the same numbers, of twice as many sequences."""
    shapes = []
    plain = cache_reference.ReferenceWriter._log_probs

    def noted(self, batch):
        hook = self.teacher.base_model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(len(kwargs["inputs_embeds"])), with_kwargs=True
        )
        found = plain(self, batch)
        hook.remove()
        return found

    monkeypatch.setattr(cache_reference.ReferenceWriter, "_log_probs", noted)
    for share, read in ((True, NUM_ROWS), (False, 2 * NUM_ROWS)):
        shapes.clear()
        given = groups(models, tmp_path / f"{share}", tmp_path / "run", share_prefix=share)
        folder = run_cache_reference(*given, ReferenceCommand())
        assert sum(shapes) == read
        found, expected = columns(folder), columns(caches["teacher"])
        for name in REFERENCE_COLUMNS + TAIL_COLUMNS:
            assert found[name] == pytest.approx(expected[name], abs=1e-4)


@pytest.mark.parametrize(("name", "options"), [("teacher", {}), ("foreign", {}), ("foreign", {"ld_alpha": 0.25})])
def test_precomputed_and_live_have_the_same_loss_and_gradients(models, caches, tmp_path, name, options):
    found = {}
    rows = easy_vqa.load("preferences", "train", 0).select(range(NUM_ROWS))
    for kind in ("live", "cached"):
        student, processor = load_model_and_processor(models["student"])
        teacher, teacher_processor = load_model_and_processor(models[name])
        trainer = PreferenceTrainer(
            student,
            teacher if kind == "live" else CachedReference(str(caches[name])),
            groups(models, None, tmp_path / "run", **options)[-1],
            train_dataset=rows,
            processing_class=processor,
            teacher_processor=teacher_processor if kind == "live" else None,
        )
        assert (trainer.ref_model is None) == (kind == "cached")
        found[kind] = raw_gradients(trainer), trainer.state.log_history[0]
    for figure in ("loss", "rewards/chosen", "rewards/rejected", "margins/teacher", "margins/student"):
        assert found["cached"][1][figure] == pytest.approx(found["live"][1][figure], abs=1e-5, rel=1e-5), figure
    assert_gradients_close(found["cached"][0], found["live"][0])


def test_the_stage_trains_from_a_cache_with_no_teacher_in_memory(models, caches, tmp_path, monkeypatch):
    options = {"max_steps": 2, "learning_rate": 1e-2, "loss_type": ["kto_pair"]}
    live = prefer.run(*groups(models, None, tmp_path / "live", **options))
    monkeypatch.setattr(stage_parts, "load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    cached = prefer.run(*groups(models, caches["teacher"], tmp_path / "cached", **options))
    for figure in ("first_loss", "last_loss"):
        assert cached[figure] == pytest.approx(live[figure], abs=1e-5)
    itself = prefer.run(*groups(models, None, tmp_path / "self", **options, reference="self"))
    assert abs(itself["first_loss"] - live["first_loss"]) > 1e-3


def test_an_interrupted_cache_goes_on_and_several_processes_write_the_same(models, caches, tmp_path, monkeypatch):
    class Breaks(cache_reference.ReferenceWriter):
        def __call__(self, numbers):
            if numbers[0] >= 5:
                raise InterruptedError
            return super().__call__(numbers)

    folder = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr(cache_reference, "ReferenceWriter", Breaks)
        with pytest.raises(InterruptedError):
            write(models, folder)
    assert len(list(folder.glob("*.parquet"))) == 1
    with pytest.raises(ValueError, match="lacks 2 of 3 shards"):
        CachedReference(str(folder))
    for shard in (1, 0):
        write(models, folder, shard=shard, num_shards=2)
    whole = caches["teacher"]
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in whole.glob("*.parquet"))


def test_a_cache_of_another_making_is_refused(models, caches, tmp_path):
    def refused(message, cache, **changes):
        chosen = groups({**models, **changes}, cache, tmp_path / "run")
        with pytest.raises(ValueError, match=message):
            prefer.run(*chosen)

    retrained = tmp_path / "retrained"
    shutil.copytree(models["teacher"], retrained)
    weights = load_file(retrained / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, retrained / "model.safetensors", metadata={"format": "pt"})
    refused("another `teacher weights`", caches["teacher"], teacher=str(retrained))
    refused("another `teacher weights`", caches["teacher"], teacher=models["foreign"])
    (tmp_path / "nothing").mkdir()
    refused("no `shards.yaml`: make the cache", tmp_path / "nothing")
    of_answers = tmp_path / "answers"
    shutil.copytree(caches["teacher"], of_answers)
    settings = (of_answers / "shards.yaml").read_text().replace("loss on: pairs", "loss on: completion")
    (of_answers / "shards.yaml").write_text(settings)
    refused("another `loss on`: 'completion' there, 'pairs' here", of_answers)

    more = groups(models, caches["teacher"], tmp_path / "run")
    more = (dataclasses.replace(more[0], max_samples=NUM_ROWS + 3), *more[1:])
    with pytest.raises(ValueError, match=f"lacks 3 of {NUM_ROWS + 3} rows .* by `llava-mod cache-reference`"):
        prefer.run(*more)


def cached_trainer(models, cache, tmp_path, rows, **changes):
    student, processor = load_model_and_processor(models["student"])
    for name, value in changes.items():
        setattr(processor, name, value)
    args = groups(models, None, tmp_path / "run")[-1]
    return PreferenceTrainer(student, CachedReference(str(cache)), args, train_dataset=rows, processing_class=processor)


def test_the_trainer_refuses_another_template_and_pairs_that_the_cache_lacks(models, caches, tmp_path):
    rows = easy_vqa.load("preferences", "train", 0)
    template = AutoProcessor.from_pretrained(models["student"]).chat_template
    with pytest.raises(ValueError, match="another `chat template`"):
        cached_trainer(models, caches["teacher"], tmp_path, rows.select(range(4)), chat_template=template + " ")
    with pytest.raises(ValueError, match=rf"lacks 2 of {NUM_ROWS + 2} rows .* by `llava-mod cache-reference`"):
        cached_trainer(models, caches["teacher"], tmp_path, rows.select(range(NUM_ROWS + 2)))
    with pytest.raises(ValueError, match="no column `images`"):
        cached_trainer(models, caches["teacher"], tmp_path, rows.select(range(4)).remove_columns("images"))


def test_a_teacher_that_is_not_finite_is_refused(models, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(models["teacher"], broken)
    weights = load_file(broken / "model.safetensors")
    for name, value in weights.items():
        if name.endswith("norm.weight"):
            value.fill_(1e30)  # finite, as whoever loads it checks, and too large to compute with
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not finite for 5 of 5 pairs"):
        write({**models, "teacher": str(broken)}, tmp_path / "cache")


def test_the_command_writes_a_card_and_pushes(models, tmp_path, hub, capsys):
    folder = tmp_path / "cache"
    argv = ["--student", models["student"], "--teacher", models["teacher"], "--teacher_cache", str(folder)]
    argv += ["--dataset_name", "embedded:easy-vqa", "--dataset_config", "preferences", "--max_samples", "4"]
    argv += ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--bf16", "false"]
    assert llava_mod_cli.main(["cache-reference", *argv, "--push_to", "somebody/pairs"]) == 0, capsys.readouterr().err
    card = (folder / "README.md").read_text()
    assert "4 pairs of `embedded:easy-vqa`" in card and "teacher_cache: somebody/pairs" in card
    assert models["teacher"] not in card
    assert llava_mod_cli.main(["cache-reference", *argv, "--reference", "self"]) == 2
    assert "a cache is of the teacher" in capsys.readouterr().err
