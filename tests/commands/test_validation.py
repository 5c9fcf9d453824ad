"""Validation on the command line: which rows a stage is evaluated on, and that they are never those of training."""

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file

from helpers import stages
from helpers.stages import StopsAt, adapt, mimic, prefer
from helpers.trainers import ONE_FAST
from llava_mod_cli import main
from llava_mod_hf.commands import mimic as mimic_module
from llava_mod_hf.commands import stage_parts
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.easy_vqa import image_paths

STAGES = {"adapt": adapt, "mimic": mimic, "prefer": prefer}
EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
NOWHERE = dict.fromkeys(("student", "teacher", "language_model"), "nothing")


@pytest.fixture
def data(monkeypatch):
    """`data(**options)`: gives the stages these options of their rows."""

    def set_options(**options):
        defaults = {"dataset_name": "embedded:easy-vqa", "max_samples": 8}
        monkeypatch.setattr(
            stages,
            "data_arguments",
            lambda config="mixture": DataArguments(**{**defaults, "dataset_config": config, **options}),
        )

    return set_options


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """`conversations(name, questions)`: a file in LLaVA's format, of one picture for each question."""
    root = tmp_path_factory.mktemp("rows")
    for number, path in zip(range(8), image_paths("test").values(), strict=False):
        shutil.copyfile(path, root / f"{number}.png")

    def write(name, questions):
        turns = [
            [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "yes"}]
            for question in questions
        ]
        content = [{"image": f"{number}.png", "conversations": turn} for number, turn in enumerate(turns)]
        (root / name).write_text(json.dumps(content))
        return str(root / name)

    return write


def evaluated(run):
    return [logs for logs in run["log_history"] if "eval_loss" in logs]


@pytest.mark.parametrize("stage", ONE_FAST)
def test_a_stage_is_evaluated_on_rows_held_out(folders, tmp_path, stage):
    run = STAGES[stage](folders, tmp_path, test_split_size=2, eval_answers=2, **EACH_STEP)
    found = evaluated(run)
    assert [logs["step"] for logs in found] == [1, 2]
    assert all("eval_exact_match" in logs for logs in found)
    assert run["recipe"]["test_split_size"] == 2


@pytest.mark.parametrize("stage", ONE_FAST)
def test_without_that_on_the_data_sets_test_split(folders, tmp_path, monkeypatch, data, stage):
    data(max_eval_samples=5)
    read, load = [], stage_parts.load_rows
    monkeypatch.setattr(
        stage_parts,
        "load_rows",
        lambda args, **kwargs: read.append((kwargs["split"], args.max_samples)) or load(args, **kwargs),
    )
    run = STAGES[stage](folders, tmp_path, **EACH_STEP)
    assert read == [("test", 5)]
    assert len(evaluated(run)) == 2


def test_or_on_a_file_of_its_own(folders, tmp_path, data, conversations):
    data(dataset_name=conversations("train.json", ["a?"] * 6), eval_dataset_name=conversations("own.json", ["b?"] * 3))
    run = mimic(folders, tmp_path, **EACH_STEP)
    (first, _) = evaluated(run)
    assert round(first["eval_runtime"] * first["eval_samples_per_second"]) == pytest.approx(3, abs=1)


def test_the_rows_held_out_are_the_same_after_an_interruption(folders, tmp_path, monkeypatch):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "test_split_size": 2, **EACH_STEP}
    trainer, held = mimic_module.MimicTrainer, []

    def run(folder, callback, **args):
        def make(*arguments, **kwargs):
            made = trainer(*arguments, callbacks=[callback], **kwargs)
            held.append(made.eval_dataset["prompt"])
            return made

        monkeypatch.setattr(mimic_module, "MimicTrainer", make)
        return mimic(folders, folder, **{**options, **args})

    whole = run(tmp_path / "whole", StopsAt())
    with pytest.raises(InterruptedError):
        run(tmp_path / "resumed", StopsAt(2))
    with pytest.raises(ValueError, match="`test_split_size` was 2 and is 3"):
        run(tmp_path / "resumed", StopsAt(), test_split_size=3)
    resumed = run(tmp_path / "resumed", StopsAt())
    assert held[0] == held[1] == held[2]
    losses = [[logs["eval_loss"] for logs in evaluated(run)] for run in (whole, resumed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all((other[name] - value).abs().max() < 1e-6 for name, value in one.items())


@pytest.mark.parametrize("held_out", [True, False], ids=["held out", "test split"])
def test_a_cache_has_the_rows_of_the_evaluation_too(folders, tmp_path, held_out):
    values = {
        "student": folders["student"],
        "teacher": folders["teacher"],
        "teacher_cache": str(tmp_path / "cache"),
        "dataset_name": "embedded:easy-vqa",
        "dataset_config": "mixture",
        "max_samples": 6,
        "output_dir": str(tmp_path / "run"),
        **stages.ARGUMENTS,
        **EACH_STEP,
        **({"test_split_size": 2} if held_out else {"max_eval_samples": 4}),
        "max_steps": 1,
    }
    del values["hub_token"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["cache-teacher", "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["mimic", "--config", str(tmp_path / "recipe.yaml")]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert evaluated(run)[0]["eval_kl"] > 0


# What is refused


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_is_never_evaluated_on_what_it_trains(tmp_path, data, conversations, stage):
    name = conversations("train.json", ["a?"])
    for more in ({}, {"eval_dataset_name": name}, {"dataset_test_split": "validation"}):
        data(dataset_name=name, dataset_config=None, **more)
        with pytest.raises(
            ValueError, match="has no rows apart from those that are trained on: give `test_split_size`"
        ):
            stage_parts.load_eval_rows(stages.data_arguments(), config_of(stage, tmp_path), ())


def test_a_mixture_is_evaluated_on_a_data_set_of_its_own(folders, tmp_path, data, conversations):
    trained = [conversations(f"{name}.json", [f"{name}?"] * 4) for name in ("a", "b")]
    mixture = {"dataset_name": None, "dataset_config": None, "datasets": trained, "max_samples": None}
    for more in ({}, {"eval_dataset_name": trained[1]}):
        data(**mixture, **more)
        with pytest.raises(
            ValueError, match=r"`.*a.json`, `.*b.json` has no rows apart from those that are trained on"
        ):
            stage_parts.load_eval_rows(stages.data_arguments(), config_of("mimic", tmp_path), ())
    data(**mixture, eval_dataset_name=conversations("c.json", ["c?"] * 3))
    rows = stage_parts.load_eval_rows(stages.data_arguments(), config_of("mimic", tmp_path), ("prompt",))
    assert len(rows) == 3
    assert all("c?" in str(prompt) for prompt in rows["prompt"])
    data(**mixture)
    run = mimic(folders, tmp_path, test_split_size=2, **EACH_STEP)
    assert len(evaluated(run)) == 2


def test_a_stream_is_not_split(tmp_path, data):
    data(streaming=True)
    with pytest.raises(ValueError, match="`test_split_size` is 2, and streamed rows cannot be told apart before"):
        mimic(NOWHERE, tmp_path, test_split_size=2, **EACH_STEP)


def test_the_training_split_is_not_evaluated_on(tmp_path, data):
    data(dataset_test_split="train")
    with pytest.raises(ValueError, match="`embedded:easy-vqa` has no rows apart from those that are trained on"):
        mimic(NOWHERE, tmp_path, **EACH_STEP)


@pytest.mark.parametrize("option", [{"eval_dataset_name": "a.json"}, {"max_eval_samples": 4}])
def test_rows_that_nothing_is_evaluated_on_are_refused(tmp_path, data, option):
    data(**option)
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}` is .*, which does nothing here: give `eval_strategy` too"):
        mimic(NOWHERE, tmp_path)
    with pytest.raises(ValueError, match=f"`{name}` is .*, which does nothing here: leave out `test_split_size`"):
        mimic(NOWHERE, tmp_path, test_split_size=2, **EACH_STEP)


def config_of(stage, folder):
    config = {"adapt": stages.AdaptConfig, "mimic": stages.MimicConfig, "prefer": stages.PreferenceConfig}[stage]
    return config(output_dir=str(folder), **{**stages.ARGUMENTS, **EACH_STEP})
