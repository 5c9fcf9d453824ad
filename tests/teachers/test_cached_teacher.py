"""A teacher's answers, cached: equal to the live ones, found by content, refused when of another making, resumable."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from helpers.cached_teacher_cases import (
    NUM_ROWS,
    SEED,
    TEMPERATURE,
    check_rows,
    mimic_config,
    read,
    recipe,
    train_rows,
    write,
)
from helpers.ddp_gradients import assert_gradients_close, raw_gradients
from llava_mod_hf import MimicTrainer
from llava_mod_hf.commands import mimic, stage_parts
from llava_mod_hf.commands.stage_parts import settings_of_teacher
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.fingerprints import row_key, weights_hash
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.losses.rows import shift_for_next_token
from llava_mod_hf.teachers import answer_cache
from llava_mod_hf.teachers.answer_cache import check_settings
from llava_mod_hf.teachers.cached_teacher import CachedTeacher

pytestmark = pytest.mark.usefixtures("rows_read_once")


def live_trainer(models, name, tmp_path, **options):
    student, processor = load_model_and_processor(models["student"])
    teacher, teacher_processor = load_model_and_processor(models[name])
    return MimicTrainer(
        student,
        teacher,
        mimic_config(tmp_path / "live", **options),
        train_dataset=train_rows(),
        processing_class=processor,
        teacher_processor=teacher_processor,
    )


def cached_trainer(models, folder, tmp_path, dataset=None, **options):
    student, processor = load_model_and_processor(models["student"])
    return MimicTrainer(
        student,
        CachedTeacher(str(folder)),
        mimic_config(tmp_path / "cached", **options),
        train_dataset=train_rows() if dataset is None else dataset,
        processing_class=processor,
    )


@pytest.mark.parametrize("name", ["teacher", "foreign"])
def test_a_cache_of_the_whole_vocabulary_gives_the_live_loss_and_gradients(models, caches, tmp_path, name):
    found = {}
    for kind in ("live", "cached"):
        # shuffled: a row's place in the cache does not matter
        options = {"train_sampling_strategy": "random", "max_steps": 1, "lm_weight": 0.5}
        if kind == "live":
            trainer = live_trainer(models, name, tmp_path, **options)
        else:
            trainer = cached_trainer(models, caches[name], tmp_path, **options)
        found[kind] = raw_gradients(trainer), trainer.state.log_history[0]
    for key in ("loss", "kl"):
        assert found["cached"][1][key] == pytest.approx(found["live"][1][key], abs=1e-5)
    assert_gradients_close(found["cached"][0], found["live"][0])


def test_the_stage_trains_from_a_cache_with_no_teacher_in_memory(models, caches, tmp_path, monkeypatch):
    def run(folder, cache):
        groups = list(recipe(models, tmp_path / "unused", "teacher", max_steps=2))
        groups[1].teacher_cache = cache
        groups[-1].output_dir = str(folder)
        return mimic.run(*groups)

    live = run(tmp_path / "live", None)
    monkeypatch.setattr(stage_parts, "load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    cached = run(tmp_path / "cached", str(caches["teacher"]))
    for key in ("first_loss", "last_loss"):
        assert cached[key] == pytest.approx(live[key], abs=1e-5)
    assert live["first_loss"] != live["last_loss"]


def explicit_distributions(models, example):
    """Distributions of the live teacher over a row's response tokens at the temperature, in float64."""
    model, processor = load_model_and_processor(models["teacher"])
    batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([dict(example)])
    keep, _ = shift_for_next_token(batch.pop("labels"))
    with torch.no_grad():
        return (model(**batch).logits[keep].double() / TEMPERATURE).softmax(-1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_k_most_likely_tokens_are_kept_at_the_temperature(models, tmp_path, dtype):
    k = 5
    folder = write(models, tmp_path / "cache", top_k=k, log_probs_dtype=dtype)
    cached = read(folder)
    assert (len(cached), cached["row"][:]) == (NUM_ROWS, list(range(NUM_ROWS)))
    for number in (0, 3, NUM_ROWS - 1):
        expected, tokens = explicit_distributions(models, train_rows()[number]).topk(k)
        row = cached[number]
        assert row["aligned"] == [True] * len(tokens)
        assert row["token_ids"] == tokens.tolist()
        tolerance = 1e-5 if dtype == "float32" else 2e-3
        np.testing.assert_allclose(row["log_probs"], expected.log().numpy(), rtol=tolerance, atol=1e-5)


def test_a_cache_is_a_data_set_with_a_card(models, caches):
    folder = caches["foreign"]
    rows_of = read(folder)
    stream = load_dataset(str(folder), split="train", streaming=True)
    assert len(rows_of) == NUM_ROWS
    assert [row["key"] for row in stream] == rows_of["key"][:]
    card = (folder / "README.md").read_text()
    assert "path: '*.parquet'" in card
    assert models["foreign"] not in card  # no folder of this machine
    assert "softmax(logits / 2.0)" in card
    # the ends of turns differ, and have no numbers
    assert sum(map(sum, rows_of["aligned"][:])) == sum(map(len, rows_of["token_ids"][:]))
    assert all(flags[-1] is False for flags in rows_of["aligned"][:])


def test_rows_are_found_by_content(caches, processor):
    teacher = CachedTeacher(str(caches["teacher"]))
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    data = train_rows()
    whole = read(caches["teacher"])
    for numbers in ([3, 0, 17], [5], [5, 5]):
        examples = [data[number] for number in numbers]
        batch = collator([dict(example) for example in examples])
        own = teacher.collate(examples, batch)
        expected = [token for number in numbers for token in whole[number]["token_ids"]]
        assert own["index"].tolist() == expected
        labels = batch.pop("labels")
        answer = teacher.rows(batch, own, labels)
        assert answer.aligned.all()
        assert len(answer.aligned) == len(expected) == (labels[:, 1:] != -100).sum()
        assert (answer.index.dtype, answer.log_probs.dtype) == (torch.int64, torch.float32)


def test_rows_that_the_cache_lacks_are_refused_with_their_number(caches, processor, tmp_path):
    teacher = CachedTeacher(str(caches["teacher"]))
    check_rows(teacher, train_rows().shuffle(seed=0))
    more = easy_vqa.load("mixture", "train", SEED).select(range(10, NUM_ROWS + 7))
    known = {str((row["prompt"], row["completion"])) for row in train_rows()}
    new = [number for number, row in enumerate(more) if str((row["prompt"], row["completion"])) not in known]
    assert 10 in new and len(new) > 1
    with pytest.raises(ValueError, match=rf"lacks {len(new)} of 17 rows.*first row {new[0]}, whose words"):
        check_rows(teacher, more)
    columns = train_rows().select_columns(["prompt", "completion", "images"])
    images = columns["images"][:]
    swapped = Dataset.from_dict({**columns[:], "images": [images[-1], *images[1:]]}, features=columns.features)
    with pytest.raises(ValueError, match=r"lacks 1 of 16 rows.*first row 0, whose images"):
        check_rows(teacher, swapped)
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    examples = [dict(row) for row in more.select([0, 15, 16])]
    with pytest.raises(ValueError, match=r"lacks 2 of 3 rows of a batch"):
        teacher.collate(examples, collator([dict(example) for example in examples]))
    short = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True, max_length=25)
    with pytest.raises(ValueError, match=r"Row 10 .* take the `max_length`"):
        teacher.collate(examples[:1], short([dict(examples[0])]))


def test_a_key_says_words_and_images_and_nothing_else():
    row = train_rows()[0]
    key = row_key(row)
    assert key == row_key({**row, "kind": "other", "row": 7})
    assert key != row_key({**row, "completion": [{"role": "assistant", "content": "other"}]})
    image = row["images"][0].convert("RGB")
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert key == row_key({**row, "images": [image]})
    assert key.split("-")[0] == row_key({**row, "images": [changed]}).split("-")[0]
    assert len({key, row_key({**row, "images": [changed]}), row_key({**row, "images": []})}) == 3


def trained_from(models, folder, **changes):
    """The checks of a cache by the mimic stage and its trainer, with a recipe that differs."""
    groups = recipe(models, folder, **{k: v for k, v in changes.items() if k in ("temperature", "bf16")})
    distill = dataclasses.replace(groups[1], **{k: v for k, v in changes.items() if k.startswith("teacher_")})
    processor = changes.get("processor") or AutoProcessor.from_pretrained(models["student"])
    teacher = CachedTeacher(str(folder), expected=settings_of_teacher(distill, trust_remote_code=False))
    teacher.check_run(groups[-1], processor, changes.get("rows") or train_rows())
    return teacher


def copy_of(models, name, tmp_path, change):
    """Another folder of a model, after `change(folder)`."""
    folder = tmp_path / "changed"
    shutil.copytree(models[name], folder)
    change(folder)
    return {**models, "teacher": str(folder)}


def change_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.norm.weight"][0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(folder, name, change):
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


CHANGES = {
    "teacher weights": change_weight,
    "teacher config": lambda f: change_json(f, "config.json", lambda c: c["text_config"].update(rms_norm_eps=1e-3)),
    "teacher chat template": lambda f: (f / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<image>"),
    "teacher image processor": lambda f: change_json(
        f, "processor_config.json", lambda c: c["image_processor"].update(image_mean=[0.1, 0.1, 0.1])
    ),
    "teacher image tokens": lambda f: change_json(f, "processor_config.json", lambda c: c.update(patch_size=8)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_teacher_is_refused_by_what_differs(models, caches, tmp_path, what):
    with pytest.raises(ValueError, match=f"another `{what}`"):
        trained_from(copy_of(models, "teacher", tmp_path, CHANGES[what]), caches["teacher"])


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("temperature", {"temperature": 1.0}),
        ("teacher dtype", {"teacher_dtype": "bfloat16"}),
        ("teacher quantization", {"teacher_quantization": "8bit"}),
        ("loss on", {"rows": [{"text": "", "images": []}]}),
        ("mixed precision", {"bf16": True}),
    ],
)
def test_other_options_are_refused(models, caches, what, changes):
    with pytest.raises(ValueError, match=f"another `{what}`"):
        trained_from(models, caches["teacher"], **changes)


@pytest.mark.parametrize(
    ("what", "changes"), [("temperature", {"temperature": 1.0}), ("loss on", {"completion_only_loss": False})]
)
def test_the_trainer_refuses_what_the_stage_does(models, caches, tmp_path, what, changes):
    with pytest.raises(ValueError, match=f"another `{what}`"):
        cached_trainer(models, caches["teacher"], tmp_path, **changes)


def test_the_trainer_refuses_another_template_and_rows_that_the_cache_lacks(models, caches, tmp_path, monkeypatch):
    more = easy_vqa.load("mixture", "train", SEED).select(range(NUM_ROWS + 3))
    with pytest.raises(ValueError, match="lacks 3 of 23 rows"):
        cached_trainer(models, caches["teacher"], tmp_path, dataset=more)
    original = MimicTrainer.__init__

    def with_other_template(self, *args, processing_class, **kwargs):
        processing_class.chat_template += " "
        original(self, *args, processing_class=processing_class, **kwargs)

    monkeypatch.setattr(MimicTrainer, "__init__", with_other_template)
    with pytest.raises(ValueError, match="another `chat template`"):
        cached_trainer(models, caches["teacher"], tmp_path)


def test_a_cache_of_other_tokens_than_are_compared_is_refused(models, caches, tmp_path, tokenizer):
    size = len(tokenizer)
    options = {"reference_compat": ["vocab_slice"], "reference_vocab_size": size - 8}
    with pytest.raises(ValueError, match=f"over {size} tokens, and the first {size - 8} are compared"):
        cached_trainer(models, caches["teacher"], tmp_path, **options)


@pytest.mark.parametrize("name", ["ALIGNMENT_VERSION", "ROW_KEY_VERSION"])
def test_a_cache_of_an_older_version_is_refused(models, caches, monkeypatch, name):
    version = getattr(answer_cache, name)
    monkeypatch.setattr(answer_cache, name, version + 1)
    said = f"another `{name.lower().replace('_', ' ')}`: {version} there, {version + 1} here"
    with pytest.raises(ValueError, match=said):
        trained_from(models, caches["teacher"])


def test_another_template_of_the_student_is_refused(models, caches, processor):
    other = copy.deepcopy(processor)
    other.chat_template += " "
    with pytest.raises(ValueError, match="another `chat template`"):
        trained_from(models, caches["teacher"], processor=other)


def test_the_same_teacher_elsewhere_in_other_files_is_the_same(models, caches, tmp_path):
    def reshard(folder):
        model, _ = load_model_and_processor(str(folder))
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="50KB")
        assert len(list(folder.glob("*.safetensors"))) > 2

    elsewhere = copy_of(models, "teacher", tmp_path, reshard)
    assert weights_hash(tmp_path / "changed") == weights_hash(Path(models["teacher"]))
    assert trained_from(elsewhere, caches["teacher"]).settings["temperature"] == TEMPERATURE


def test_a_teacher_that_is_not_on_this_machine_is_not_compared(models, caches):
    elsewhere = {**models, "teacher": "somebody/teacher-that-is-not-here"}
    assert trained_from(elsewhere, caches["teacher"])
    with pytest.raises(ValueError, match="another `temperature`"):
        trained_from(elsewhere, caches["teacher"], temperature=1.0)


def test_no_cache_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match="cache-teacher"):
        check_settings(tmp_path, {})
