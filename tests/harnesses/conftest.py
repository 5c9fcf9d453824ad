"""A sparse student on disk, and what `llava-mod evaluate` says of it, for the tests of both harnesses."""

import functools
import json
from types import SimpleNamespace

import pytest

from helpers.harnesses import TOKENS
from llava_mod_cli import main
from llava_mod_hf import upcycle
from llava_mod_hf.data.scene_rows import load as load_scenes
from llava_mod_hf.loading import load_model_and_processor


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """`student(name)`: the folder of a sparse student with the weights of an embedded teacher, who knows something."""

    @functools.cache
    def student(name):
        folder = tmp_path_factory.mktemp("student")
        teacher, processor = load_model_and_processor(name)
        upcycle(teacher, num_experts=2, num_experts_per_tok=2).save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return student


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """`measured(folder, measures, **rows)`: figures by measure, the answers in their order, and the results' file."""

    def measured(folder, measures, **rows):
        results = tmp_path_factory.mktemp("results") / "results.json"
        words = [word for name, value in rows.items() for word in (f"--{name}", value)]
        words = [json.dumps(word) if isinstance(word, dict) else str(word) for word in words]
        argv = ["evaluate", "--model", str(folder), "--blind", "false", "--max_new_tokens", str(TOKENS)]
        assert main([*argv, "--measures", *measures, "--output_file", str(results), *words]) == 0
        lines = results.with_suffix(".answers.jsonl").read_text().splitlines()[1:]
        found = json.loads(results.read_text())["student"]["measures"]
        figures = {name: {figure: each["value"] for figure, each in of.items()} for name, of in found.items()}
        return SimpleNamespace(figures=figures, answers=[json.loads(line)["given"] for line in lines], path=results)

    return measured


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Files of one's own: `pope.jsonl`, `chair.jsonl` and a list of words for things."""
    folder = tmp_path_factory.mktemp("data")
    rows = {"pope": [], "chair": []}
    for number, row in enumerate(load_scenes("presence", "test", 0, {"rows": 6})):
        row["images"][0].save(folder / f"{number}.png")
        picture = {"image": f"{number}.png"}
        sort = ("random", "popular", "adversarial")[number % 3]
        rows["pope"].append({**picture, "question": row["question"], "answer": row["answer"], "category": sort})
        rows["chair"].append(
            {**picture, "question": "describe the picture.", "answer": "a circle", "objects": ["circle"]}
        )
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    (folder / "list.txt").write_text("circle, disc\nsquare, box\ntriangle\n")
    return folder
