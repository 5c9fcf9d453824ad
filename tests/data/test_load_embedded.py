"""The embedded worlds by a recipe's options."""

import re

import pytest
from datasets import IterableDataset

from helpers.load_cases import load
from llava_mod_hf import recipes
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.load import load_rows

SCENES = "embedded:scenes"


@pytest.mark.parametrize(
    ("config", "columns"),
    [
        ("describe", ("prompt", "completion")),
        ("mixture", ("prompt", "completion", "question", "answer", "kind")),
        ("preferences", ("prompt", "chosen", "rejected")),
        ("prompts", ("prompt",)),
    ],
)
def test_every_stage_finds_its_columns(config, columns):
    args = DataArguments(dataset_name=SCENES, dataset_config=config, dataset_options={"rows": 5})
    rows = load_rows(args, columns=columns, seed=3)
    assert len(rows) == 5
    assert set(columns) <= set(rows.column_names)
    assert rows[0]["images"][0].size == (64, 64)


def test_options_come_as_json_from_the_command_line():
    args = DataArguments(dataset_name=SCENES, dataset_config="mixture", dataset_options='{"rows": 4, "first_row": 2}')
    whole = DataArguments(dataset_name=SCENES, dataset_config="mixture", dataset_options={"rows": 6})
    answers = [load_rows(each, columns=("completion",))["answer"][:] for each in (args, whole)]
    assert answers[0] == answers[1][2:]


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", "recipe.yaml"],
        ["--dataset_name", SCENES, "--dataset_options", '{"rows": 4, "wrong_answers": 0.5}'],
        ["--config", "recipe.yaml", "--dataset_options", '{"rows": 4, "wrong_answers": 0.5}'],
    ],
    ids=["recipe", "command line", "both"],
)
def test_options_come_by_either_door(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = 9 if len(argv) > 2 else 4  # the command line has the last word
    options = f"{{rows: {rows}, wrong_answers: 0.5}}"
    (tmp_path / "recipe.yaml").write_text(f"dataset_name: {SCENES}\ndataset_options: {options}\n")
    (args,) = recipes.parse([DataArguments], argv)
    assert args.dataset_options == {"rows": 4, "wrong_answers": 0.5}


def test_options_of_another_kind_are_told_by_their_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"dataset_name: {SCENES}\ndataset_options: [4]\n")
    with pytest.raises(ValueError, match=re.escape("has `dataset_options: [4]`, which is of another kind than")):
        recipes.parse([DataArguments], ["--config", str(tmp_path / "recipe.yaml")])


def test_a_bad_option_is_told_before_a_row_is_drawn():
    args = DataArguments(
        dataset_name=SCENES, dataset_config="mixture", dataset_options={"rows": 10**9, "skew": 2}, streaming=True
    )
    with pytest.raises(ValueError, match="`skew` of `embedded:scenes` is 2: give a share between 0 and 1."):
        load_rows(args, columns=("prompt",))


def test_streamed_rows_are_drawn_as_they_are_read():
    args = DataArguments(
        dataset_name=SCENES, dataset_config="mixture", dataset_options={"rows": 10**9}, streaming=True, max_samples=2
    )
    rows = load_rows(args, columns=("prompt", "completion"))
    assert isinstance(rows, IterableDataset)
    assert len(list(rows)) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("{rows: 4}", "`dataset_options` is `{rows: 4}`, which is no JSON"),
        ("[4]", "`dataset_options` is [4]: give options and their values."),
    ],
)
def test_options_that_are_none_are_told(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        DataArguments(dataset_name=SCENES, dataset_options=options)


def test_options_of_another_data_set_are_told():
    with pytest.raises(
        ValueError, match="`dataset_options` are of `embedded:scenes`, and the data set is `embedded:easy"
    ):
        load("embedded:easy-vqa", dataset_config="captions", dataset_options={"rows": 4})


def test_an_unknown_world_is_told():
    with pytest.raises(
        ValueError, match="There is no data set `embedded:none`: the embedded ones are `embedded:scenes`"
    ):
        load("embedded:none")
