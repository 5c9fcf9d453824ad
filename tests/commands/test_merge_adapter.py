"""Stages that train an adapter: what they write, how it loads, and that merged it says the same."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.ddp_gradients import mimic_trainer, rows, sharpened
from helpers.stages import StopsAt, adapt, mimic, prefer
from llava_mod_cli import main
from llava_mod_hf import LlavaModForConditionalGeneration
from llava_mod_hf.commands import mimic as mimic_module
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.training import output_folder

LORA = {"use_peft": True, "lora_r": 4, "learning_rate": 0.05}
STAGES = {"mimic": mimic, "prefer": prefer}


@pytest.fixture(scope="module")
def sparse(folders, make_student, processor, tmp_path_factory):
    """The folders with a sparse student."""
    folder = tmp_path_factory.mktemp("sparse")
    sharpened(make_student()).save_pretrained(folder)
    processor.save_pretrained(folder)
    return {**folders, "student": str(folder)}


@pytest.fixture(scope="module")
def adapters(sparse, tmp_path_factory):
    """`{stage: folder}` of adapters after two steps."""
    root = tmp_path_factory.mktemp("adapters")
    runs = {stage: run(sparse, root / stage, **LORA) for stage, run in STAGES.items()}
    assert [run["stage"] for run in runs.values()] == ["mimic_sparse", "prefer"]
    return {stage: root / stage for stage in STAGES}


def logits(model, processor):
    row = rows()[0]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"][0]["content"]}]}]
    )
    inputs = processor(images=row["images"], text=text, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs.to(dtype=model.dtype)).logits


def merge(*argv):
    return main(["merge-adapter", *(str(arg) for arg in argv)])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_an_adapter_and_what_belongs_to_it(adapters, sparse, stage):
    folder = adapters[stage]
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "run.json", "tokenizer.json"}
    assert not names & {"config.json", "model.safetensors", "training_args.bin"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == sparse["student"]
    assert config["modules_to_save"] == ["multi_modal_projector"]
    with pytest.raises(ValueError, match="finished run"):
        STAGES[stage](sparse, folder, **LORA)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_merged_it_says_what_the_adapter_says(adapters, sparse, tmp_path, stage, dtype, tolerance):
    unmerged = AutoModelForImageTextToText.from_pretrained(adapters[stage], dtype=dtype, experts_implementation="eager")
    processor = AutoProcessor.from_pretrained(adapters[stage])
    expected = logits(unmerged, processor)
    student, _ = load_model_and_processor(sparse["student"])
    assert (expected - logits(student, processor)).abs().max() > 1e-2 * expected.abs().max()

    assert merge("--adapter", adapters[stage], "--output_dir", tmp_path / "merged", "--dtype", dtype) == 0
    merged = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "merged", dtype=dtype, experts_implementation="eager"
    )
    found = logits(merged, AutoProcessor.from_pretrained(tmp_path / "merged"))
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert merged.config.moe_layers == [0, 2]
    run = json.loads((tmp_path / "merged" / "run.json").read_text())
    assert run["recipe"]["student"] == sparse["student"]


def test_weights_are_merged_in_the_type_that_they_are_stored_in(adapters, tmp_path):
    for options, dtype in ([], torch.float32), (["--dtype", "bfloat16"], torch.bfloat16):
        folder = tmp_path / str(dtype)
        assert merge("--adapter", adapters["mimic"], "--output_dir", folder, *options) == 0
        assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {dtype}


def test_an_adapter_answers_by_its_folders_name(adapters, tmp_path):
    model, processor = load_model_and_processor(str(adapters["mimic"]))
    merge("--adapter", adapters["mimic"], "--output_dir", tmp_path / "merged")
    merged, _ = load_model_and_processor(str(tmp_path / "merged"))
    torch.testing.assert_close(logits(model, processor), logits(merged, processor), rtol=0, atol=1e-4)


def test_what_makes_an_adapter_loadable_is_moved_in_place_last(sparse, tmp_path, monkeypatch):
    moved, replace = [], os.replace

    def move(*paths):
        moved.append(Path(paths[1]).name)
        replace(*paths)

    monkeypatch.setattr(output_folder.os, "replace", move)
    mimic(sparse, tmp_path, **LORA, max_steps=1)
    assert moved[-2:] == ["adapter_config.json", "run.json"]
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="holds a model that would be overwritten"):
        mimic(sparse, tmp_path, **LORA)


@pytest.mark.slow
def test_an_interrupted_adapter_goes_on_from_its_last_checkpoint(sparse, tmp_path, monkeypatch):
    saving = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "random"}
    trainer = mimic_module.MimicTrainer

    def run(folder, callback):
        monkeypatch.setattr(
            mimic_module, "MimicTrainer", lambda *args, **kw: trainer(*args, callbacks=[callback], **kw)
        )
        return mimic(sparse, folder, **LORA, **saving)

    run(tmp_path / "whole", StopsAt())
    with pytest.raises(InterruptedError):
        run(tmp_path / "resumed", StopsAt(2))
    assert not (tmp_path / "resumed" / "adapter_config.json").exists()
    run(tmp_path / "resumed", rest := StopsAt())
    assert rest.taken == 2
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)


# What is refused


@pytest.mark.parametrize("command", ["upcycle", "export", "mimic"])
def test_an_adapter_is_not_trained_upcycled_or_exported(adapters, folders, tmp_path, capsys, command):
    output = ["--output_dir", str(tmp_path / "out")]
    if command == "mimic":
        with pytest.raises(ValueError, match="is an adapter: merge it with its student first"):
            mimic({**folders, "student": str(adapters["mimic"])}, tmp_path / "out")
        return
    name = {"upcycle": "--student", "export": "--model"}[command]
    more = ["--form", "stock"] if command == "export" else []
    assert main([command, name, str(adapters["mimic"]), *output, *more]) == 2
    assert "is an adapter: merge it with its student first, by `llava-mod merge-adapter`" in capsys.readouterr().err


def test_a_trainer_refuses_a_student_with_its_adapter_inside(adapters, trainer_of_mimic):
    student = AutoModelForImageTextToText.from_pretrained(adapters["mimic"])
    with pytest.raises(ValueError, match="was loaded with its adapter inside"):
        trainer_of_mimic(student)


@pytest.fixture
def trainer_of_mimic(make_student, processor, tmp_path):
    return lambda student: mimic_trainer(student, make_student(moe_layers=[]), processor, tmp_path)


@pytest.mark.parametrize(
    ("run", "what"),
    [
        (adapt, "this stage makes the student"),
        (lambda *a, **k: mimic(*a, ["all"], **k), r"makes a sparse student \(`moe_l"),
    ],
)
def test_an_adapter_of_a_student_that_the_stage_makes_is_refused_first(tmp_path, run, what):
    nowhere = dict.fromkeys(("student", "teacher", "language_model"), "nothing")
    with pytest.raises(ValueError, match=f"{what}.*save it, by `llava-mod upcycle`"):
        run(nowhere, tmp_path, **LORA)


def test_what_cannot_be_merged_is_told_in_a_sentence(adapters, folders, make_student, processor, tmp_path, capsys):
    config = make_student().config
    config.text_config.intermediate_size = 96
    LlavaModForConditionalGeneration(config).save_pretrained(wider := tmp_path / "wider")
    processor.save_pretrained(wider)
    assert merge("--adapter", folders["student"], "--output_dir", tmp_path / "out") == 2
    assert "has no adapter_config.json: give the folder of a run with `use_peft`" in capsys.readouterr().err
    options = ["--adapter", adapters["mimic"], "--output_dir"]
    assert merge(*options, folders["student"]) == 2
    assert "holds a model that would be overwritten" in capsys.readouterr().err
    assert merge(*options, tmp_path / "out", "--student", folders["student"]) == 2
    assert "is no adapter of" in capsys.readouterr().err
    assert merge(*options, tmp_path / "out", "--student", wider) == 2
    assert "is no adapter of" in capsys.readouterr().err
    (nameless := tmp_path / "nameless").mkdir()
    config = json.loads((adapters["mimic"] / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    save_file(load_file(adapters["mimic"] / "adapter_model.safetensors"), nameless / "adapter_model.safetensors")
    assert merge("--adapter", nameless, "--output_dir", tmp_path / "out") == 2
    assert "does not name the student that it is an adapter of: give `student`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
