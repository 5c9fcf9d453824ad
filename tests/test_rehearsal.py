"""Each recipe from `check` to `publish` at its real sizes: as a user runs it, with few layers and few rows."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig

from helpers import rehearsal
from helpers.published_models import ONEVISION, PUBLISHED, QWEN3_VL, published_config
from helpers.real_shapes import LAYERS, shallow, tokenizer
from llava_mod_cli import commands
from llava_mod_hf import recipes
from llava_mod_hf.commands.check import stage_of
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.load import load_rows

ROOT = Path(__file__).parents[1]
LAYER_KEYS = {"num_hidden_layers", "depth", "layer_types", "deepstack_visual_indexes"}


def sizes(values):
    """A config's values without those that say how many layers there are."""
    if isinstance(values, dict):
        return {name: sizes(value) for name, value in values.items() if name not in LAYER_KEYS}
    return values


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shallow_model_has_all_sizes_but_layers(name):
    published, found = published_config(name), shallow(published_config(name), 2)
    assert sizes(found.to_dict()) == sizes(published.to_dict())
    assert found.get_text_config().num_hidden_layers == 2 < published.get_text_config().num_hidden_layers


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("Qwen/Qwen2-0.5B-Instruct", {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
        (ONEVISION, {"<|im_end|>": 151645, "<image>": 151646, "<video>": 151647}),
        (QWEN3_VL, {"<|im_end|>": 151645, "<|vision_start|>": 151652, "<|image_pad|>": 151655, "</think>": 151668}),
    ],
)
def test_special_tokens_have_their_published_ids(name, ids):
    words = tokenizer(name)
    assert {token: words.convert_tokens_to_ids(token) for token in ids} == ids
    assert len(words) == max(words.get_vocab().values()) + 1 <= published_config(name).get_text_config().vocab_size
    assert words.decode(words.encode("a red circle.")) == "a red circle."


@pytest.mark.parametrize("recipe", rehearsal.RECIPES)
def test_every_command_that_is_rehearsed_is_known(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = rehearsal.commands(recipe)
    stages = [words for words in lines if words[0] in ("adapt", "mimic", "prefer")]
    assert [Path(words[2]).stem for words in stages] == list(rehearsal.STAGES)
    checks = [words[1:] for words in lines if words[0] == "check"]
    assert checks == [words[1:] for words in stages]
    for words in stages:
        assert stage_of(words[2]) == words[0]
    for words in lines:
        if words[0] != "check":
            recipes.parse(commands()[words[0]].groups(), words[1:])
    assert [words[0] for words in lines[-2:]] == ["evaluate", "publish"]
    assert lines[-2][2] == lines[-1][2] != "runs"


@pytest.mark.parametrize("recipe", ["qwen2-0.5b", "qwen2-1.5b-24gb"])
def test_data_is_written_where_the_recipe_reads_it(recipe, tmp_path, monkeypatch):
    rehearsal.write_data(recipe, tmp_path)
    monkeypatch.chdir(tmp_path)
    for stage, values in rehearsal.recipe_values(recipe).items():
        names = ("dataset_name", "datasets", "image_folder")
        args = DataArguments(**{name: values[name] for name in names if name in values})
        columns = ("prompt", "chosen", "rejected") if stage == "4_prefer" else ("prompt", "completion")
        rows = load_rows(args, columns=columns)
        assert len(rows) == (3 if stage == "4_prefer" else 6 * len(values.get("datasets") or [None]))
        pictures = {len(images) for images in rows["images"]}
        assert pictures == (
            {1} if stage in ("1_adapt", "4_prefer") else {0, 1, 2} if args.datasets and "2_" in stage else {0, 1}
        )


def test_a_rehearsal_stops_at_what_fails_and_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rehearsal, "write_models", lambda recipe, folder: None)
    monkeypatch.setattr(
        rehearsal,
        "run_python",
        lambda code, words, folder, log: {"seconds": 1.0, "gigabytes": 0.5, "code": int("adapt" in words)},
    )
    assert rehearsal.main(["--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "qwen2-0.5b" / "rehearsal.json").read_text())
    assert [(row["command"], row["code"]) for row in rows] == [
        ("models", 0),
        ("check 1_adapt", 0),
        ("adapt 1_adapt", 1),
    ]
    assert "FAILED (1)" in capsys.readouterr().out
    assert "| all | 3.0 | 0.50 |" in rehearsal.table(rows)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("recipe", rehearsal.RECIPES)
def test_a_recipe_runs_from_check_to_publish_at_its_real_sizes(recipe, tmp_path):
    out = tmp_path / recipe
    try:
        rows = rehearsal.rehearse(recipe, out)
        log = (out / "rehearsal.log").read_text()
        assert [row["code"] for row in rows] == [0] * (len(rehearsal.commands(recipe)) + 1), log[-4000:]
        assert log.count("\nready\n") == len(rehearsal.STAGES)
        assert max(row["gigabytes"] for row in rows) < 12
        check_students(recipe, out)
    finally:
        shutil.rmtree(out)


def check_students(recipe, out):
    values = rehearsal.recipe_values(recipe)
    for name, stage in zip(("adapt", "mimic_dense", "mimic_sparse", "prefer"), rehearsal.STAGES, strict=True):
        run = json.loads((out / values[stage]["output_dir"] / "run.json").read_text())
        norms = [entry["grad_norm"] for entry in run["log_history"] if "grad_norm" in entry]
        assert run["stage"] == name and len(norms) == run["steps"]
        assert all(0 < norm < float("inf") for norm in norms), (stage, norms)
    evaluated = Path(rehearsal.commands(recipe)[-1][2])
    results = json.loads((out / evaluated / "results.json").read_text())
    assert 0 < results["student"]["kl_to_teacher"] < float("inf")
    config = AutoConfig.from_pretrained(out / evaluated)
    text = published_config(values["1_adapt"]["language_model"]).get_text_config()
    found = config.get_text_config()
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert getattr(found, key) == getattr(text, key), key
    assert (found.num_hidden_layers, found.moe_layers, found.num_experts) == (LAYERS["student"], [0], 4)
    vision = published_config(values["1_adapt"]["vision_tower"]).vision_config
    assert (config.vision_config.hidden_size, config.vision_config.image_size) == (
        vision.hidden_size,
        vision.image_size,
    )
    assert config.image_seq_length == (vision.image_size // vision.patch_size) ** 2 == 576
    assert config.image_token_index == len(tokenizer(values["1_adapt"]["language_model"]))  # behind all of its own
    assert (out / "runs" / recipe / "hub" / "README.md").is_file()
