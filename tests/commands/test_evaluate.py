"""`llava-mod evaluate` in the world of scenes: its measures, its options, and where the blind baseline learns."""

import json

import pytest

from llava_mod_cli import main
from llava_mod_hf.data.scene_rows import DATASET, load
from llava_mod_hf.evaluation.answers import evaluate_blind

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
