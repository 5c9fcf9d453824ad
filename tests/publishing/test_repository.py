"""The folder that `publish` writes: whole or not at all, and what a process without the package does with it."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoProcessor

from helpers.publishing import FACTS, REPO, RESULTS, tree
from llava_mod_hf import LlavaModForConditionalGeneration
from llava_mod_hf.publishing import repository
from llava_mod_hf.publishing.push import push_checkpoint
from llava_mod_hf.publishing.repository import publish
from llava_mod_hf.students.stock_export import merge_experts

LOADS = {0: [0.25, 0.25, 0.4, 0.1], 2: [0.25, 0.25, 0.25, 0.25]}
PUBLISH = {
    "facts": FACTS,
    "history": {"mimic_dense": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"train_runtime": 3.0}]},
    "loads": LOADS,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_student, processor):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_student().save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"a pickle of the trainer's")
    return folder


@pytest.fixture(scope="module")
def published(checkpoint, tmp_path_factory):
    return publish(checkpoint, tmp_path_factory.mktemp("published") / "tiny", **PUBLISH)


def test_publish_writes_a_whole_repository(published, checkpoint):
    assert {
        "README.md",
        ".eval_results/easy-vqa.yaml",
        "config.json",
        "configuration_llava_mod.py",
        "figures/expert_load.png",
        "figures/losses.png",
        "generation_config.json",
        "model.safetensors",
        "modeling_llava_mod.py",
        "processor_config.json",
        "recipe.yaml",
        "results.json",
        "tokenizer.json",
    } <= tree(published).keys()
    assert "training_args.bin" not in tree(published)
    assert [path.name for path in published.parent.iterdir()] == ["tiny"]
    assert published.stat().st_mode & 0o777 == published.parent.joinpath("tiny", "figures").stat().st_mode & 0o777

    loaded = ModelCard.load(published / "README.md")
    assert loaded.data.eval_results[0].metric_value == 0.931 and loaded.data.model_name == "tiny"
    for figure in re.findall(r"\]\((figures/.*?)\)", loaded.text):
        assert Image.open(published / figure).format == "PNG"
    assert json.loads((published / "results.json").read_text())["student"] == RESULTS
    assert (published / "recipe.yaml").read_text() == FACTS.recipe_text
    state = LlavaModForConditionalGeneration.from_pretrained(published).state_dict()
    for name, tensor in LlavaModForConditionalGeneration.from_pretrained(checkpoint).state_dict().items():
        assert tensor.equal(state[name])
    assert AutoProcessor.from_pretrained(published).tokenizer.get_vocab()


def test_dense_student_has_no_load_figure(make_student, processor, tmp_path):
    make_student(moe_layers=()).save_pretrained(tmp_path / "dense")
    processor.save_pretrained(tmp_path / "dense")
    folder = publish(tmp_path / "dense", tmp_path / "out", **{**PUBLISH, "loads": {}})
    assert not (folder / "figures" / "expert_load.png").exists()
    assert "expert_load" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("loads", [{}, {0: [0.5, 0.5]}, {0: [1.0], 1: [1.0]}])
def test_loads_of_other_layers_are_refused(checkpoint, tmp_path, loads):
    with pytest.raises(ValueError, match=r"mixture-of-experts layers are \[0, 2\]"):
        publish(checkpoint, tmp_path / "out", **{**PUBLISH, "loads": loads})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("breaks", ["plot_losses", "render_card", "write_eval_results", "check_publishable"])
def test_failure_half_way_leaves_the_old_folder(published, checkpoint, tmp_path, monkeypatch, breaks):
    old = shutil.copytree(published, tmp_path / "out")
    (old / "mark.txt").write_text("old")
    before = tree(old)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(repository, breaks, fail)
    with pytest.raises(OSError, match="disk full"):
        publish(checkpoint, old, **PUBLISH)
    assert tree(old) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failure_of_the_last_rename_puts_the_old_folder_back(published, checkpoint, tmp_path, monkeypatch):
    old = shutil.copytree(published, tmp_path / "out")
    before, replace, calls = tree(old), os.replace, []

    def fail_on_second(source, target):
        calls.append((source, target))
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(
        os, "replace", lambda *args: replace(*args) if "out" not in str(args) else fail_on_second(*args)
    )
    with pytest.raises(OSError, match="disk full"):
        publish(checkpoint, old, **PUBLISH)
    assert tree(old) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publishing_again_replaces_the_old_folder_whole(published, checkpoint, tmp_path):
    old = shutil.copytree(published, tmp_path / "out")
    (old / "mark.txt").write_text("old")
    publish(checkpoint, old, **PUBLISH)
    assert tree(old) == tree(published)


def test_folders_that_are_not_ours_are_left_alone(checkpoint, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "only_copy.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not a published student"):
        publish(checkpoint, tmp_path / "photos", **PUBLISH)
    with pytest.raises(ValueError, match="holds the checkpoint"):
        publish(checkpoint, checkpoint.parent, **PUBLISH)
    with pytest.raises(ValueError, match="holds the checkpoint"):
        publish(checkpoint, checkpoint, **PUBLISH)
    with pytest.raises(ValueError, match="has no config.json"):
        publish(tmp_path / "photos", tmp_path / "out", **PUBLISH)
    assert (tmp_path / "photos" / "only_copy.txt").read_text() == "precious"


def test_a_model_of_another_kind_is_refused(checkpoint, make_student, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    merge_experts(make_student()).save_pretrained(folder)
    with pytest.raises(ValueError, match="is a LlavaForConditionalGeneration, not a student of this package"):
        publish(folder, tmp_path / "out", **PUBLISH)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_recipe_with_a_token_is_not_published(checkpoint, tmp_path):
    facts = dataclasses.replace(FACTS, recipe_text="hub_token: hf_" + "b" * 34)
    with pytest.raises(ValueError, match="contains a Hub token"):
        publish(checkpoint, tmp_path / "out", **{**PUBLISH, "facts": facts})
    assert not list(tmp_path.iterdir())


def test_usage_of_the_card_works_in_a_process_without_the_package(hub, published, tmp_path):
    """From the Hub, by the card's own words, in a fresh process that has the remote code alone."""
    push_checkpoint(published, REPO)
    snippet = re.search(r"```python\n(.*?)```", (published / "README.md").read_text(), re.DOTALL)[1]
    snippet += "\nimport sys\nassert 'llava_mod_hf' not in sys.modules\nprint(type(model).__module__, 'done')\n"
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "image.png")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,  # transformers asks there when code is not trusted
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert re.search(r"transformers_modules\S*modeling_llava_mod done", run.stdout)
