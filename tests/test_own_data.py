"""docs/own-data.md from its first block to its last, on pictures and rows of its own formats."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from helpers.own_data import write_own_data
from llava_mod_cli import commands, main
from llava_mod_hf import recipes
from llava_mod_hf.commands.check import stage_of

PAGE = Path(__file__).parents[1] / "docs" / "own-data.md"
TEXT = PAGE.read_text()
STAGES = {"adapt": "1_adapt", "mimic_dense": "2_mimic_dense", "mimic_sparse": "3_mimic_sparse", "prefer": "4_prefer"}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """The page's commands as lists of words, in a folder that has its recipes, files and pictures."""
    monkeypatch.chdir(tmp_path)
    Path("recipes", "own").mkdir(parents=True)
    named = re.findall(r"`(recipes/own/\w+\.yaml)`:\n\n```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    assert [text for _, text in named] == blocks("yaml")
    for path, text in named:
        Path(path).write_text(text)
    conversations, pairs = (json.loads(block) for block in blocks("json"))
    write_own_data(Path("data", "own"), conversations, pairs)
    return [shlex.split(line) for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]


def test_every_command_and_recipe_of_the_page_is_known(lines):
    assert {words[0] for words in lines} == {"llava-mod"}
    used = [words[1] for words in lines]
    assert set(used) >= {"check", "adapt", "mimic", "upcycle", "merge-adapter", "prefer", "evaluate", "publish"}
    checked = []
    for _, command, *argv in lines:
        if command == "check":
            assert argv[:1] == ["--config"] and len(argv) == 2
            checked.append(f"{stage_of(argv[1])} {argv[1]}")
            continue
        recipes.parse(commands()[command].groups(), argv)
    stages = [f"{words[1]} {words[3]}" for words in lines if words[2] == "--config" and words[1] != "check"]
    assert checked == stages
    assert [Path(stage).stem for stage in stages] == list(STAGES.values())


def test_each_command_reads_what_one_before_it_wrote(lines):
    written = {f"data/own/{name}.json" for name in ("train", "test", "preferences")}
    for _, command, *argv in lines:
        options = dict(zip(argv[::2], argv[1::2], strict=True))
        values = yaml.safe_load(Path(options["--config"]).read_text()) if "--config" in options else {}
        values |= {name.removeprefix("--"): value for name, value in options.items()}
        read = [values.get(name) for name in ("student", "model", "adapter", "checkpoint", "dataset_name")]
        assert {name for name in read if name} <= written, (command, values)
        if command != "check":
            written.add(values.get("output_dir"))


@pytest.mark.slow
def test_the_page_runs_as_it_stands(lines, hub, capsys):
    for _, command, *argv in lines:
        assert main([command, *argv]) == 0, (command, capsys.readouterr().err)
        out = capsys.readouterr().out
        assert command != "check" or out.endswith("\nready\n")

    runs = {name: json.loads(Path("runs/own", name, "run.json").read_text()) for name in STAGES}
    for name, run in runs.items():
        logs = [log for log in run["log_history"] if "eval_loss" in log]
        assert bool(logs) == (name != "adapt"), name
        assert name == "adapt" or all(0 < log["eval_loss"] < float("inf") for log in logs)
    figures = {name: {key for log in run["log_history"] for key in log} for name, run in runs.items()}
    assert "eval_kl" in figures["mimic_dense"] and "eval_exact_match" in figures["mimic_sparse"]
    for name in ("mimic_sparse", "prefer"):
        assert Path("runs/own", name, "adapter_config.json").is_file()
    results = json.loads(Path("runs/own/student/results.json").read_text())
    assert results["num_questions"] == len(json.loads(Path("data/own/test.json").read_text()))
    assert results["student"]["kl_to_teacher"] > 0
    repo = hub.repos["you/student"]
    assert repo.private and {"README.md", "model.safetensors", "config.json"} <= repo.resolve("main").files.keys()
    card = repo.resolve("main").files["README.md"].content.decode()
    assert "Exact match" in card and str(Path.cwd()) not in card
    assert re.findall(r"^stage: (\w+)$", card, re.MULTILINE) == list(STAGES)  # of all that led to it
