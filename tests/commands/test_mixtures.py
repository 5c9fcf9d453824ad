"""Stages that read a mixture: from a recipe or from Python, counted, stopped and taken up again."""

import functools
import json

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from trl.trainer.sft_trainer import SFTTrainer

from helpers.stages import ARGUMENTS, StopsAt
from llava_mod_cli import main
from llava_mod_hf import MimicConfig, MimicTrainer
from llava_mod_hf.commands import cache_teacher, prefer
from llava_mod_hf.commands import mimic as mimic_module
from llava_mod_hf.commands.arguments import DistillArguments, UpcycleArguments
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.fitting import fit_rows
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.data.mixture import SOURCE, count_sources
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.publishing.provenance import gather_facts
from llava_mod_hf.training.run_recipe import Recipe, check_same_recipe, write_recipe

COLORS = ("red", "blue", "teal", "gray", "black", "white")
CAPTIONS = {"path": "embedded:easy-vqa", "name": "captions", "max_samples": 24}
NAME = "embedded:easy-vqa (captions)"
STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "train_sampling_strategy": "random", "seed": 3}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Rows of LLaVA's format, with pictures beside them."""
    folder = tmp_path_factory.mktemp("own")
    rows = []
    for number in range(24):
        color = COLORS[number % len(COLORS)]
        Image.new("RGB", (16, 16), color).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat is the color?"}, {"from": "gpt", "value": color}]
        rows.append({"id": number, "image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return str(folder / "rows.json")


@pytest.fixture
def entries(own):
    return [{"path": own, "weight": 3}, {**CAPTIONS, "weight": 1}]


def mimic(folders, output_dir, data, **args):
    return mimic_module.run(
        data,
        DistillArguments(student=folders["student"], teacher=folders["teacher"]),
        UpcycleArguments(),
        MimicConfig(output_dir=str(output_dir), **{**ARGUMENTS, **STEPS, **args}),
    )


def test_a_recipe_names_several_data_sets_and_the_run_says_what_it_read(folders, own, entries, tmp_path):
    options = {name: value for name, value in {**ARGUMENTS, "max_steps": 3}.items() if name != "hub_token"}
    recipe = {
        "student": folders["student"],
        "teacher": folders["teacher"],
        "datasets": entries,
        "output_dir": str(tmp_path / "run"),
        **options,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["mimic", "--config", str(tmp_path / "recipe.yaml"), "--seed", "3"]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    rows = load_rows(DataArguments(datasets=entries), columns=("prompt", "completion"), seed=3)
    # rows in their order, two of them in each of three steps
    assert run["datasets"] == {
        name: {"rows": count, "read": rows["source_dataset"][:6].count(number)}
        for number, (name, count) in enumerate(count_sources(rows).items())
    }
    assert run["recipe"]["datasets"] == entries
    assert "dataset_name" not in run["recipe"]
    assert gather_facts(tmp_path / "run", "you/student").datasets == [own, "embedded:easy-vqa"]
    # what a run has written can be run again, and paths alone can be given on the command line
    again = [
        "--config",
        str(tmp_path / "run" / "recipe.yaml"),
        "--output_dir",
        str(tmp_path / "again"),
        "--max_steps",
        "1",
    ]
    assert main(["mimic", *again, "--datasets", own, json.dumps(CAPTIONS)]) == 0
    assert json.loads((tmp_path / "again" / "run.json").read_text())["datasets"][NAME]["rows"] == 24


@pytest.mark.parametrize("key", ["wieght", "multi_turn"])
def test_a_mistyped_key_of_an_entry_stops_the_command(tmp_path, capsys, key):
    text = yaml.safe_dump({"datasets": [{"path": "a.json", key: 1}], "output_dir": str(tmp_path / "run")})
    (tmp_path / "recipe.yaml").write_text(f"{text}student: a\nteacher: b\n")
    assert main(["mimic", "--config", str(tmp_path / "recipe.yaml")]) != 0
    told = capsys.readouterr().err
    assert f"has the unknown key `{key}`" in told and "keys are path, name, data_dir" in told
    assert not (tmp_path / "run").exists()


def test_both_front_doors_train_on_the_same_rows(folders, entries, tmp_path, monkeypatch):
    seen = []

    def trainer(*args, train_dataset, **kwargs):
        seen.append(train_dataset)
        raise InterruptedError

    monkeypatch.setattr(mimic_module, "MimicTrainer", trainer)
    with pytest.raises(InterruptedError):
        mimic(folders, tmp_path, DataArguments(datasets=entries))
    _, processor = load_model_and_processor(folders["student"])
    rows = load_rows(DataArguments(datasets=entries), columns=("prompt", "completion"), seed=STEPS["seed"])
    rows, _ = fit_rows(rows, processor, max_length=None)
    assert rows.features == seen[0].features
    names = [name for name in rows.column_names if name != "images"]
    assert rows.select_columns(names)[:] == seen[0].select_columns(names)[:]
    pairs = zip(rows["images"], seen[0]["images"], strict=True)
    assert all(mine[0].tobytes() == other[0].tobytes() for mine, other in pairs)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param("all", marks=pytest.mark.slow),
        "streamed",
        pytest.param("streamed again and again", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_taken_up_reads_the_same_rows_and_goes_on_counting(folders, entries, tmp_path, monkeypatch, rows):
    streaming, again = rows != "all", rows.endswith("again")
    # passes of 3 rows that end in the middle of a batch, and a stop in the second of them
    data = DataArguments(datasets=entries, streaming=streaming, max_samples=3 if again else None)
    stop = 4 if again else 3
    whole = mimic(folders, tmp_path / "whole", data)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(mimic_module, "MimicTrainer", functools.partial(MimicTrainer, callbacks=[StopsAt(stop)]))
        mimic(folders, tmp_path / "run", data)
    state = json.loads((tmp_path / "run" / f"checkpoint-{stop - 1}" / "trainer_state.json").read_text())
    assert sum(state["stateful_callbacks"]["RowsRead"]["attributes"]["counts"]) == 2 * (stop - 1)
    run = mimic(folders, tmp_path / "run", data)
    assert run["datasets"] == whole["datasets"]
    assert sum(found["read"] for found in run["datasets"].values()) == 8
    assert again or all(found["read"] > 0 for found in run["datasets"].values())
    assert (run["datasets"][NAME]["rows"] is None) == streaming
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(found[name].equal(value) for name, value in expected.items())
    reweighted = [{**entries[0], "weight": 2}, entries[1]]
    with pytest.raises(ValueError, match="`datasets` was .*'weight': 3.* and is .*'weight': 2"):
        # of the checkpoints that are there, not of the finished run
        check_same_recipe(
            tmp_path / "run" / "checkpoint-4",
            Recipe({**run_options(tmp_path), "datasets": reweighted}, {}),
        )


def run_options(folder):
    return yaml.safe_load((folder / "run" / "recipe.yaml").read_text())


def test_the_workers_of_a_stream_may_not_change(tmp_path):
    for streaming in (True, False):
        write_recipe(Recipe({"streaming": streaming, "dataloader_num_workers": 2}, {}), tmp_path)
        recipe = Recipe({"streaming": streaming, "dataloader_num_workers": 1}, {})
        if not streaming:
            check_same_recipe(tmp_path, recipe)
            continue
        with pytest.raises(ValueError, match="`dataloader_num_workers` was 2 and is 1"):
            check_same_recipe(tmp_path, recipe)


def test_evaluation_during_training_counts_nothing(folders, entries, tmp_path):
    model, processor = load_model_and_processor(folders["student"])
    teacher, _ = load_model_and_processor(folders["teacher"])
    rows, _ = fit_rows(
        load_rows(DataArguments(datasets=entries), columns=("prompt", "completion")), processor, max_length=None
    )
    args = {**ARGUMENTS, "eval_strategy": "steps", "eval_steps": 1, "dataloader_num_workers": 1}
    trainer = MimicTrainer(
        model,
        teacher,
        MimicConfig(output_dir=str(tmp_path), **args),
        train_dataset=rows,
        eval_dataset=rows.select(range(6)),
        processing_class=processor,
    )
    trainer.train()
    assert sum(trainer.rows_read.counts) == 4
    assert SOURCE in next(iter(trainer.get_train_dataloader()))
    assert SOURCE not in next(iter(trainer.get_eval_dataloader()))
    plain = MimicTrainer(
        model,
        teacher,
        MimicConfig(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=rows.remove_columns("source_dataset"),
        processing_class=processor,
    )
    assert plain.rows_read is None and isinstance(plain, SFTTrainer)


def test_pairs_of_two_data_sets_and_their_cached_reference(folders, own, tmp_path):
    pairs = [
        {"image": f"{number}.png", "question": "what is the color?", "chosen": COLORS[number], "rejected": "a circle"}
        for number in range(4)
    ]
    path = own.replace("rows.json", "pairs.json")
    with open(path, "w") as file:
        json.dump(pairs, file)
    data = {"datasets": [path, {"path": "embedded:easy-vqa", "name": "preferences", "max_samples": 4}]}
    arguments = {
        **{k: v for k, v in ARGUMENTS.items() if k != "hub_token"},
        "max_steps": 4,
        **data,
        **folders_of(folders),
    }
    arguments |= {"output_dir": str(tmp_path / "run"), "teacher_cache": str(tmp_path / "cache")}
    (tmp_path / "prefer.yaml").write_text(yaml.safe_dump(arguments))
    for command in ("cache-reference", "prefer"):
        assert main([command, "--config", str(tmp_path / "prefer.yaml")]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [found["read"] for found in run["datasets"].values()] == [4, 4]
    assert "pairs.json, embedded:easy-vqa" in (tmp_path / "cache" / "README.md").read_text()
    assert own not in (tmp_path / "cache" / "README.md").read_text()


def folders_of(folders):
    return {name: folders[name] for name in ("student", "teacher")}


def test_a_cache_of_a_mixture_trains_the_same_mixture(folders, entries, tmp_path):
    arguments = {**{k: v for k, v in ARGUMENTS.items() if k != "hub_token"}, "datasets": entries, **folders_of(folders)}
    arguments |= {"output_dir": str(tmp_path / "run"), "teacher_cache": str(tmp_path / "cache"), "lm_weight": 0.0}
    (tmp_path / "mimic.yaml").write_text(yaml.safe_dump(arguments))
    for command in ("cache-teacher", "mimic"):
        assert main([command, "--config", str(tmp_path / "mimic.yaml")]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert sum(found["read"] for found in run["datasets"].values()) == 4
    assert cache_teacher.OPTIONS[0] == prefer.OPTIONS[0] == "data.arguments:DataArguments"


def test_the_adaptor_is_trained_on_a_mixture(folders, own, tmp_path):
    options = ["--vision_tower", folders["teacher"], "--language_model", folders["language_model"]]
    options += ["--datasets", own, json.dumps(CAPTIONS), "--output_dir", str(tmp_path / "run"), "--max_steps", "2"]
    more = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 4}
    assert main(["adapt", *options, *(str(part) for name, value in more.items() for part in (f"--{name}", value))]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert sum(found["read"] for found in run["datasets"].values()) == 8


def test_measures_are_of_one_data_set(capsys):
    assert (
        main(["evaluate", "--model", "embedded:tiny-teacher", "--datasets", "a", "b", "--output_file", "x.json"]) != 0
    )
    assert "measures are of one: give `dataset_name`" in capsys.readouterr().err
