"""The stages through their argument dataclasses: what they write, what they refuse, and how they resume."""

import errno
import functools
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, LlamaForCausalLM

from helpers.leaks import find_leaks, private_words
from helpers.stages import ARGUMENTS, TOKEN, StopsAt, adapt, mimic, prefer
from llava_mod_cli import main
from llava_mod_hf import MimicConfig, MimicTrainer, PreferenceConfig
from llava_mod_hf.commands import mimic as mimic_module
from llava_mod_hf.commands import parts
from llava_mod_hf.commands.arguments import DistillArguments, StudentArguments, UpcycleArguments
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.students.router_bias import router_biases
from llava_mod_hf.training import progress
from llava_mod_hf.training.adapt_config import AdaptConfig
from llava_mod_hf.training.checkpoints import last_complete_checkpoint

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle")


GROUPS = {
    "adapt": (DataArguments, StudentArguments, AdaptConfig),
    "mimic_dense": (DataArguments, DistillArguments, UpcycleArguments, MimicConfig),
    "mimic_sparse": (DataArguments, DistillArguments, UpcycleArguments, MimicConfig),
    "prefer": (DataArguments, DistillArguments, PreferenceConfig),
}
STAGES = {
    "adapt": adapt,
    "mimic_dense": mimic,
    "mimic_sparse": functools.partial(mimic, moe_layers=["alternate"]),
    "prefer": prefer,
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_what_can_be_loaded_and_nothing_else(folders, tmp_path, stage):
    run = STAGES[stage](folders, tmp_path)

    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "configuration_llava_mod.py",
        "modeling_llava_mod.py",
        "processor_config.json",
        "tokenizer.json",
        "recipe.yaml",
        "run.json",
    }
    assert not [path for path in tmp_path.rglob("*") if path.suffix in PICKLES or path.name.startswith("tmp")]
    written = [path for path in tmp_path.iterdir() if path.is_file()]
    assert all(path.stat().st_mtime_ns <= (tmp_path / "run.json").stat().st_mtime_ns for path in written)
    assert not [path.name for path in written if TOKEN.encode() in path.read_bytes()]

    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert "hub_token" not in recipe
    assert (recipe["max_steps"], recipe["max_samples"], recipe["adam_beta1"]) == (2, 8, 0.9)
    parsed = HfArgumentParser(GROUPS[stage]).parse_dict(recipe)  # a recipe can be run again: no unknown key
    assert parsed[-1].learning_rate == ARGUMENTS["learning_rate"]
    saved = json.loads((tmp_path / "run.json").read_text())
    assert saved == json.loads(json.dumps(run))
    assert (saved["stage"], saved["steps"]) == (stage, 2)
    chosen = saved["recipe"]
    assert chosen.items() <= recipe.items()
    assert chosen.keys() >= {"max_steps", "max_samples", "learning_rate", "dataset_config"}
    assert not chosen.keys() & {"adam_beta1", "dataset_test_split", "num_experts"}
    losses = [entry["loss"] for entry in saved["log_history"] if "loss" in entry]
    assert [saved["first_loss"], saved["last_loss"]] == losses

    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.config.moe_layers == ([0, 2] if stage == "mimic_sparse" else [])
    assert AutoProcessor.from_pretrained(tmp_path).image_token == "<image>"

    with pytest.raises(ValueError, match="finished run"):
        STAGES[stage](folders, tmp_path)


def test_adapt_trains_the_adaptor_alone(folders, tmp_path):
    adapt(folders, tmp_path)
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    tower = AutoModelForImageTextToText.from_pretrained(folders["teacher"]).state_dict()
    language_model = LlamaForCausalLM.from_pretrained(folders["language_model"]).state_dict()
    for name, value in trained.items():
        if "vision_tower" in name:
            assert torch.equal(value, tower[name]), name
        elif "language_model" in name:
            assert torch.equal(value, language_model[name.replace("model.language_model", "model")]), name


def test_upcycling_at_the_start_keeps_the_students_function(folders, tmp_path):
    dense, sparse = (
        mimic(folders, tmp_path / name, layers, router_aux_loss_coef=coef)
        for name, layers, coef in (("dense", None, None), ("sparse", ["alternate"], 0.0))
    )
    assert sparse["first_loss"] == pytest.approx(dense["first_loss"], rel=1e-5)


def test_a_recipe_balances_routers_by_their_biases(folders, tmp_path, capsys):
    options = {"router_bias_update": 0.01, "router_aux_loss_coef": 0.0, "max_steps": 1}
    run = mimic(folders, tmp_path / "run", moe_layers=["alternate"], **options)
    assert run["recipe"]["router_bias_update"] == 0.01
    student, _ = load_model_and_processor(str(tmp_path / "run"))
    for bias in router_biases(student):
        assert bias.abs().max() == torch.tensor(0.01)
    argv = ["--student", "s", "--teacher", "t", "--dataset_name", "d", "--output_dir", str(tmp_path / "no")]
    assert main(["mimic", *argv, "--router_bias_update", "-1", "--use_cpu", "true", "--bf16", "false"]) == 2
    assert "`router_bias_update` is -1.0: give a number of 0 or more, such as 0.001." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("moe_layers", "expected"), [(["all"], [0, 1, 2]), (["1"], [1]), ([0, 2], [0, 2]), (["second_half"], [1, 2])]
)
def test_placements_of_a_recipe(make_student, moe_layers, expected):
    args = UpcycleArguments(moe_layers=moe_layers, num_experts=3, num_experts_per_tok=1)
    student = parts.upcycle_student(make_student(moe_layers=[]), args, router_aux_loss_coef=0.5)
    assert student.config.moe_layers == expected
    assert (student.config.num_experts, student.config.num_experts_per_tok) == (3, 1)
    assert student.config.router_aux_loss_coef == 0.5


def test_without_placement_the_student_stays(make_student):
    student = make_student(moe_layers=[])
    assert parts.upcycle_student(student, UpcycleArguments()) is student


@pytest.mark.parametrize(
    "moe_layers", [pytest.param(None, id="dense", marks=pytest.mark.slow), pytest.param(["alternate"], id="sparse")]
)
def test_an_interrupted_run_goes_on_from_its_last_whole_checkpoint(folders, tmp_path, monkeypatch, moe_layers):
    def run(folder, callback):
        monkeypatch.setattr(mimic_module, "MimicTrainer", functools.partial(MimicTrainer, callbacks=[callback]))
        # shuffled, and shorter than the learning rate's schedule: order and optimiser must be restored as well
        return mimic(
            folders,
            folder,
            moe_layers,
            max_steps=3,
            save_strategy="steps",
            save_steps=1,
            train_sampling_strategy="random",
        )

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(whole, StopsAt())
    with pytest.raises(InterruptedError):
        run(resumed, StopsAt(2))
    assert not (resumed / "run.json").exists()
    assert not (resumed / "config.json").exists()
    assert last_complete_checkpoint(resumed) == str(resumed / "checkpoint-1")
    shutil.copytree(resumed / "checkpoint-1", resumed / "checkpoint-2")
    (resumed / "checkpoint-2" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(resumed) == str(resumed / "checkpoint-1")

    rest = StopsAt()
    summary = run(resumed, rest)
    assert rest.taken == 2
    assert summary["steps"] == 3
    assert [entry["step"] for entry in summary["log_history"] if "loss" in entry] == [1, 2, 3]
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_the_last_whole_checkpoint_is_the_highest_by_number(tmp_path):
    assert last_complete_checkpoint(tmp_path / "missing") is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_the_first_step_does_not_count_towards_the_time_of_a_step(monkeypatch):
    ticks = iter([40.0, 41.0, 43.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(ticks))
    timer = progress.StepTimer()
    timer.on_train_begin(None, None, None)
    timer.on_step_end(None, None, None)
    assert timer.seconds_per_step() is None
    timer.on_step_end(None, None, None)
    timer.on_step_end(None, None, None)
    assert timer.seconds_per_step() == 1.5


NOWHERE = dict.fromkeys(("student", "teacher", "language_model"), "nothing")  # refused before a model is looked for


@pytest.mark.parametrize("stage", [adapt, mimic, prefer])
def test_a_logger_that_is_not_installed_is_refused_first(tmp_path, stage):
    with pytest.raises(
        ValueError, match="`report_to` is 'wandb', and its library is not installed: `pip install wandb`"
    ):
        stage(NOWHERE, tmp_path, report_to="wandb")


def test_experts_without_a_place_are_refused_first(tmp_path):
    args = (MimicConfig(output_dir=str(tmp_path), **ARGUMENTS), UpcycleArguments(num_experts=8))
    with pytest.raises(ValueError, match="`num_experts` is 8, which does nothing without `moe_layers`"):
        mimic_module.run(None, None, args[1], args[0])


@pytest.mark.parametrize("stage", [adapt, mimic, prefer])
def test_a_folder_with_another_model_is_refused_first(folders, stage):
    with pytest.raises(ValueError, match=r"student` holds a model that would be overwritten"):
        stage(NOWHERE, folders["student"])


@pytest.mark.parametrize("stage", [adapt, mimic, prefer])
def test_a_stage_that_pushes_tells_the_hub_nothing_of_this_machine(folders, hub, tmp_path, monkeypatch, stage):
    words = private_words(monkeypatch, tmp_path, hub.token)
    output_dir = tmp_path / "run"
    options = {"save_strategy": "steps", "save_steps": 1, "hub_model_id": "me/student", "hub_revision": "first"}
    options |= {"hub_tag": "v1", "hub_private_repo": True, "hub_gated": "manual"}
    stage(folders, output_dir, push_to_hub=True, hub_token=hub.token, **options)
    assert (output_dir / "run.json").is_file()
    assert find_leaks(output_dir, [hub.token]) == []
    assert not [path for path in output_dir.iterdir() if path.name.startswith((".", "tmp"))]
    repo = hub.repos["me/student"]
    commits = repo.commits("first")
    assert {"model.safetensors", "config.json", "README.md", "recipe.yaml"} <= set(commits[0].files)
    assert "How it was trained is not recorded" not in commits[0].files["README.md"].content.decode()
    assert commits[0].message == "End of training"
    assert {"model.safetensors", "config.json"} <= set(commits[1].files) and "README.md" not in commits[1].files
    assert (repo.private, repo.gated, repo.tags) == (True, "manual", {"v1": commits[0]})
    assert [path for path in repo.branches["main"].files if path != ".gitattributes"] == []
    assert find_leaks(hub.received(), words) == []

    hub.requests.clear()
    with pytest.raises(ValueError, match="has a tag `v1` of another commit"):  # before it trains
        stage(folders, tmp_path / "again", push_to_hub=True, hub_token=hub.token, **options)
    assert not [path for method, path in hub.requests if method == "PUT" and path.startswith("/lfs")]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/1"),
    ],
    ids=["file", "pickle"],
)
def test_a_full_disk_is_one_sentence(folders, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"checkpoint-1` could not be written \(.*\): make room, and start again"):
        mimic(folders, tmp_path, save_strategy="steps", save_steps=1)
    assert last_complete_checkpoint(tmp_path) is None
