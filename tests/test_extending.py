"""docs/extending.md: its files are there, and its code does what it says from outside the package."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import llava_mod_cli
import llava_mod_hf
from llava_mod_hf import PreferenceConfig, PreferenceTrainer
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.formats import FORMATS
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.evaluation import benchmarks
from llava_mod_hf.losses import register_preference_loss
from llava_mod_hf.losses.preference_losses import PREFERENCE_LOSSES

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
PACKAGE = Path(llava_mod_hf.__file__).parent


def code_of(heading):
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(\w+/\w+\.py)`", PAGE))))
def test_the_files_that_it_names_are_there(path):
    assert (PACKAGE / path).is_file()


@pytest.mark.parametrize(
    "name", re.findall(r"`([A-Z_]{5,}|read_row|logit_transform|evaluate_model)` of `(\w+/\w+\.py)`", PAGE)
)
def test_the_tables_that_it_names_are_in_their_files(name):
    table, path = name
    assert re.search(rf"^(def )?{table}\b", (PACKAGE / path).read_text(), re.MULTILINE)


def test_a_format_of_ones_own(tmp_path, monkeypatch):
    known = dict(FORMATS)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    try:
        exec(code_of("A format of data"), {})
        (row,) = read_captions(tmp_path)
    finally:
        FORMATS.clear()
        FORMATS.update(known)
    assert row["completion"] == [{"role": "assistant", "content": "A cat on a mat."}]
    assert row["images"][0].getpixel((0, 0)) == (255, 0, 0)


def read_captions(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "cat.png")
    rows = [{"image": "cat.png", "caption": caption} for caption in ("A cat on a mat.", "")]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    arguments = DataArguments(str(tmp_path / "captions.json"), bad_rows="drop", max_bad_rows=1.0)
    return load_rows(arguments, columns=("prompt", "completion"))


@pytest.fixture
def own_losses():
    known = dict(PREFERENCE_LOSSES)
    yield
    PREFERENCE_LOSSES.clear()
    PREFERENCE_LOSSES.update(known)


def test_a_preference_loss_of_ones_own(make_student, processor, tmp_path, own_losses):
    with pytest.raises(ValueError, match="There is no `loss_type` `cpo`: give one of kto_pair, kto_pair_norm, margin"):
        preference_config(tmp_path, "cpo")
    exec(code_of("A preference loss"), {})
    student, teacher = make_student(moe_layers=()), make_student(moe_layers=(), seed=1)
    rows = easy_vqa.load("preferences", "train").select(range(2))
    found = {}
    for name in ("cpo", "cpo_norm"):
        trainer = PreferenceTrainer(
            student, teacher, preference_config(tmp_path, name), train_dataset=rows, processing_class=processor
        )
        batch = next(iter(trainer.get_train_dataloader()))
        student.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        found[name] = student.model.multi_modal_projector.linear_2.weight.grad.clone()

        student.zero_grad()
        mask = batch["completion_mask"][:, 1:]
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
        inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1)[: 2 * len(rows)]
        logits = student(**inputs).logits[:, :-1].double()
        log_probs = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0] * mask
        sums = log_probs.sum(1) / (mask.sum(1) if name == "cpo_norm" else 1)
        margin = sums[: len(rows)] - sums[len(rows) :]
        (-(0.1 * margin).sigmoid().log().mean()).backward()
        expected = student.model.multi_modal_projector.linear_2.weight.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    assert not torch.allclose(found["cpo"], found["cpo_norm"], rtol=0.1)
    with pytest.raises(ValueError, match="A preference loss `cpo` cannot be added"):
        exec(code_of("A preference loss"), {})


def test_a_preference_loss_of_trls_name_is_refused(tmp_path, own_losses):
    register_preference_loss("sigmoid", lambda pairs, beta: pairs.student_chosen.mean())
    with pytest.raises(ValueError, match="`sigmoid` is TRL's and one that was added"):
        preference_config(tmp_path, "sigmoid")


def preference_config(folder, loss_type):
    options = {
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_length": None,
    }
    return PreferenceConfig(output_dir=str(folder), loss_type=loss_type, beta=0.1, **options)


def test_a_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "count_rows.py").write_text(code_of("A command"))
    monkeypatch.setattr(llava_mod_cli, "FOLDER", tmp_path)
    monkeypatch.setattr("llava_mod_hf.commands.__path__", [str(tmp_path)])
    argv = ["count-rows", "--dataset_name", "embedded:easy-vqa", "--dataset_config", "mixture", "--max_samples", "7"]
    assert llava_mod_cli.main(argv) == 0
    assert capsys.readouterr().out == "7\n"


def test_a_measure_of_ones_own(monkeypatch):
    monkeypatch.setattr(benchmarks, "BENCHMARKS", dict(benchmarks.BENCHMARKS))
    exec(code_of("A measure"), {})
    rows = [{"question": "what?", "answer": answer, "kind": ""} for answer in ("a red circle", "a square")]
    found = benchmarks.measure(["word_recall"], rows, ["A red square", "a"])["word_recall"]["word_recall"]
    assert found["value"] == 3 / 5 and found["low"] < 3 / 5 < found["high"]
