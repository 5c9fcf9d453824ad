"""All that the commands leave in a run's folder, by the commands themselves: what of it a push brings, and tells."""

import json
import shutil

import pytest

from helpers.leaks import find_leaks, private_words
from helpers.stages import mimic
from llava_mod_cli import main
from llava_mod_hf import push_checkpoint
from llava_mod_hf.data.scene_rows import load

REPO = "me/student"

ROWS = 12

# words of rows, and of this machine: never sent
KEPT_HERE = {
    "run.json", "examples.jsonl", "router.jsonl", "report.html", "report.png", "report_routers.png",
    "results.answers.jsonl", "results.teacher_answers.jsonl",
}  # fmt: skip

SENT = {
    "model.safetensors", "config.json", "generation_config.json", "configuration_llava_mod.py", "modeling_llava_mod.py",
    "moe_llava_mod.py", "chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "recipe.yaml", "results.json",
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch, hub, folders):
    """A home that occurs nowhere else, with the models in it, and what should not be told."""
    words = private_words(monkeypatch, tmp_path, hub.token)
    models = {name: str(shutil.copytree(path, tmp_path / "models" / name)) for name, path in folders.items()}
    return tmp_path, models, words


def evaluate(folder, *more):
    options = ["--dataset_name", "embedded:scenes", "--dataset_config", "mixture", "--blind", "false"]
    options += ["--dataset_options", json.dumps({"rows": ROWS}), "--max_new_tokens", "8", "--measures", "pope", "chair"]
    assert main(["evaluate", "--model", str(folder), *options, *more]) == 0


@pytest.mark.slow
def test_a_run_with_all_its_files_tells_nothing_of_this_machine(hub, home):
    root, models, words = home
    run = root / "runs" / "mimic"
    options = {"eval_strategy": "steps", "eval_steps": 1, "test_split_size": 2, "eval_answers": 2, "report_to": "none"}
    mimic(models, run, moe_layers=["alternate"], hub_token=None, **options)
    evaluate(models["teacher"], "--output_file", str(root / "other.json"))
    evaluate(run, "--teacher", models["teacher"], "--against", str(root / "other.json"))
    assert main(["report", str(run)]) == 0
    written = {path.name for path in run.iterdir()}
    assert written == KEPT_HERE | SENT  # of another file it has to be said which of the two it is
    assert str(root) in (run / "results.json").read_text()

    push_checkpoint(run, REPO)
    assert main(["publish", "--checkpoint", str(run), "--output_dir", str(root / "hub"), "--push_to", "me/whole"]) == 0
    assert find_leaks(root / "hub", words) == []
    assert find_leaks(hub.received(), words) == []
    for repo in (REPO, "me/whole"):
        files = hub.repos[repo].branches["main"].files
        assert {*SENT, "README.md"} <= files.keys() and not KEPT_HERE & files.keys()
    asked = load("mixture", "test", 0, {"rows": ROWS})["question"]
    sent = hub.received()
    assert find_leaks(sent, [question.split("\n")[0] for question in set(asked)]) == []  # nor words of its test


def test_results_of_a_folder_without_a_run_are_told_in_public_names(hub, home):
    """Such as a model that was exported, or downloaded."""
    root, models, words = home
    student = root / "models" / "student"
    evaluate(models["teacher"], "--output_file", str(root / "other.json"))
    evaluate(student, "--against", str(root / "other.json"))
    assert str(root) in (student / "results.json").read_text()
    push_checkpoint(student, REPO)
    assert find_leaks(hub.received(), words) == []
    results = json.loads(hub.repos[REPO].branches["main"].files["results.json"].content)
    measured = {"num_questions", "max_new_tokens", "dtype", "versions", "commit"}
    assert results.keys() - measured == {"student", "teacher", "blind", "dataset", "weights"}
    assert "pope" in results["student"]["measures"] and "first_prompt" not in str(results)
