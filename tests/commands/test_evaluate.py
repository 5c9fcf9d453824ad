"""`llava-mod evaluate` in the world of scenes: its measures, its options, and where the blind baseline learns."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image

from helpers.own_data import write_own_data
from llava_mod_cli import main
from llava_mod_hf.commands import evaluate as evaluate_module
from llava_mod_hf.data.scene_rows import DATASET, load
from llava_mod_hf.evaluation.answers import evaluate_blind
from llava_mod_hf.fingerprints import weights_hash

ROWS = 30


def evaluate(folder, output_file, *more):
    argv = ["--dataset_name", DATASET, "--dataset_config", "mixture", "--output_file", str(output_file)]
    argv += ["--dataset_options", json.dumps({"rows": ROWS}), "--seed", "4", *more]
    assert main(["evaluate", "--model", folder, *argv]) == 0
    return json.loads(output_file.read_text())


@pytest.fixture(scope="module")
def asked():
    return load("mixture", "test", 4, {"rows": ROWS})


def test_scenes_are_measured_by_chair_and_pope(folders, tmp_path, asked):
    results = evaluate(folders["student"], tmp_path / "results.json")
    assert results["num_questions"] == ROWS
    assert results["setup"]["weights"] == weights_hash(Path(folders["student"]))
    assert results["blind"] == evaluate_blind(load("mixture", "train", 4, {"rows": ROWS}), asked)
    for who in ("student", "blind"):
        assert {results[who][name] is None for name in ("chair_s", "chair_i", "object_recall", "pope")} == {False}


def test_the_options_are_not_of_the_data_that_the_baseline_learns_from(folders, tmp_path, asked):
    training = load("presence", "train", 9, {"rows": 50}).remove_columns("images")
    rows = [row | {"images": []} for row in training]
    (tmp_path / "training.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = evaluate(
        folders["student"], tmp_path / "results.json", "--train_dataset_name", str(tmp_path / "training.jsonl")
    )
    assert results["blind"] == evaluate_blind(training, asked)


@pytest.fixture
def own(tmp_path):
    """Options for conversations as a user has them, which have no columns of questions and answers."""
    write_own_data(tmp_path / "own")
    train, test, pictures = (str(tmp_path / "own" / name) for name in ("train.json", "test.json", "pictures"))
    return ["--dataset_name", test, "--train_dataset_name", train, "--image_folder", pictures]


def test_conversations_are_measured_by_their_first_question(folders, tmp_path, own, monkeypatch):
    said = json.loads((tmp_path / "own" / "test.json").read_text())
    first = [next(turn["value"] for turn in row["conversations"] if turn["from"] == "gpt") for row in said]
    monkeypatch.setattr(
        "llava_mod_hf.evaluation.answer_file.generate_answers", lambda *args, **kwargs: [*first[:3], *["neither"] * 3]
    )
    argv = ["--model", folders["student"], "--teacher", folders["teacher"], "--output_file", str(tmp_path / "out.json")]
    assert main(["evaluate", *argv, *own]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["student"]["exact_match"] == results["teacher"]["exact_match"] == 0.5
    assert results["blind"]["exact_match"] < 1
    assert not any("exact_match_by_kind" in results[who] for who in ("student", "teacher", "blind"))


def test_where_and_in_what_precision_is_chosen(folders, tmp_path, own, monkeypatch, capsys):
    load, loaded = evaluate_module.load_model_and_processor, []

    def noted(name, **options):
        model, processor = load(name, **options)
        loaded.append((name, model.dtype))
        return model, processor

    monkeypatch.setattr(evaluate_module, "load_model_and_processor", noted)
    argv = ["evaluate", "--model", folders["student"], "--teacher", folders["teacher"], *own]
    argv += ["--max_samples", "2", "--output_file", str(tmp_path / "results.json"), "--teacher_dtype", "bfloat16"]
    assert main(argv) == 0
    assert loaded == [(folders["student"], torch.float32), (folders["teacher"], torch.bfloat16)]
    assert main([*argv, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert loaded[2] == (folders["student"], torch.bfloat16)
    assert main([*argv, "--device", "xpu:7"]) == 2
    assert "cannot be put on the device `xpu:7`" in capsys.readouterr().err


def conversations(tmp_path, count=6):
    """Rows of LLaVA's JSON, of two answers each."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    turns = [("human", "<image>\nwhat is it?"), ("gpt", "red"), ("human", "sure?"), ("gpt", "yes")]
    said = [{"from": who, "value": text} for who, text in turns]
    return [{"id": number, "image": "a.png", "conversations": said} for number in range(count)]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("multi_turn", ["whole", "expand"])
def test_llavas_json_is_measured_by_its_questions(folders, tmp_path, monkeypatch, kind, multi_turn):
    fake = "llava_mod_hf.evaluation.answer_file.generate_answers"
    monkeypatch.setattr(fake, lambda model, processor, rows, **_: ["Red."] * len(rows))
    rows, path = conversations(tmp_path), tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    if kind == "folder":
        path = tmp_path / "folder"
        path.mkdir()
        for split in ("train", "test"):
            Dataset.from_list(rows).to_parquet(path / f"{split}-00000.parquet")
    (tmp_path / "train.json").write_text(json.dumps(rows))
    train = [] if kind == "folder" else ["--train_dataset_name", str(tmp_path / "train.json")]
    argv = ["evaluate", "--model", folders["student"], "--teacher", folders["teacher"], "--dataset_name", str(path)]
    argv += ["--image_folder", str(tmp_path), "--multi_turn", multi_turn, "--output_file", str(tmp_path / "out.json")]
    assert main([*argv, *train]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["num_questions"] == (6 if multi_turn == "whole" else 12)
    assert results["student"]["exact_match"] == (1.0 if multi_turn == "whole" else 0.5)
    assert results["blind"]["exact_match"] == 1.0 and results["student"]["kl_to_teacher"] > 0


def test_prompts_that_are_texts_are_refused(folders, tmp_path, capsys):
    row = {"images": [], "prompt": "what?", "completion": "red"}
    for name in ("rows.jsonl", "train.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    argv = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--train_dataset_name", str(tmp_path / "train.jsonl")]
    assert main(["evaluate", "--model", folders["student"], *argv, "--output_file", str(tmp_path / "out.json")]) == 2
    assert "The prompts are texts, and a model is asked by its chat template" in capsys.readouterr().err
