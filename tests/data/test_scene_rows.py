"""Rows of the scenes world: the same however they are read, wrong where they were asked to be, and as the page says."""

import dataclasses
import hashlib
import io
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from helpers.scenes import ROWS, bound, drawn, pairs, plain_answer
from llava_mod_hf.data import scenes
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.data.scene_pictures import draw
from llava_mod_hf.data.scene_rows import CONFIGS, SceneOptions, load, load_text, picture, scene_row

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


# The same rows


def texts(row):
    return {name: value for name, value in row.items() if name != "images"}


def test_a_row_is_the_same_however_it_is_read():
    options = {"rows": 12, "wrong_answers": 0.5}
    rows = load("mixture", "train", 5, options)
    later = load("mixture", "train", 5, {**options, "rows": 4, "first_row": 8})
    streamed = list(load("mixture", "train", 5, options, streaming=True))
    assert len(streamed) == 12
    for row, other in zip(rows, streamed, strict=True):
        assert texts(row) == texts(other)
        assert row["images"][0].tobytes() == other["images"][0].tobytes()
    for row, other in zip(list(rows)[8:], later, strict=True):
        assert texts(row) == texts(other)
        assert row["images"][0].tobytes() == other["images"][0].tobytes()
    assert load("mixture", "train", 6, options)["answer"] != rows["answer"]
    assert load("mixture", "test", 5, options)["answer"] != rows["answer"]
    assert picture(3, "mixture", "train", 5, options).tobytes() == rows[3]["images"][0].tobytes()


def test_rows_are_those_of_every_other_process():
    """Written down once: of whatever process, machine and release of Python; embedded weights were trained on them."""
    found = [
        [dataclasses.astuple(scene), row]
        for config, split in itertools.product(CONFIGS, ("train", "test"))
        for scene, row in drawn(config, split, 1000, rows=50, wrong_answers=0.3)
    ]
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    assert digest[:16] == "46d3c0e00504f37d"


def test_rows_come_from_config_seed_split_and_number():
    places = [("mixture", "train", 0), ("mixture", "train", 1), ("mixture", "test", 0), ("preferences", "train", 0)]
    drawn_rows = [drawn(config, split, seed, rows=20) for config, split, seed in places]
    assert len({scene for rows in drawn_rows for scene, _ in rows}) == 80


# What the configs are


def test_the_mixture_has_the_shares_that_the_page_says():
    kinds = Counter(row["kind"].split(" (")[0] for _, row in drawn("mixture", "train"))
    twentieths = {"describe": 7, "presence": 6, "conversation": 3, "count": 1, "color": 1, "where": 1, "size": 1}
    assert set(kinds) == set(twentieths)
    for task, part in twentieths.items():
        assert abs(kinds[task] / ROWS - part / 20) < bound(part / 20, ROWS)


@pytest.mark.parametrize("task", scenes.TASKS)
def test_a_task_asks_for_itself_alone(task):
    assert {row["kind"].split(" (")[0] for _, row in drawn(task, "test", rows=50)} == {task}


def test_prompts_have_no_answer_and_conversations_have_a_turn_before():
    prompts = load("prompts", "train", 0, {"rows": 10})
    assert not {"completion", "chosen", "rejected"} & set(prompts.column_names)
    assert prompts["prompt"][:] == load("mixture", "train", 0, {"rows": 10})["prompt"][:]
    for row in load("conversation", "test", 0, {"rows": 5}):
        assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
        assert row["prompt"][-1]["content"] == row["question"]


def test_text_says_the_scene_in_words():
    rows = load_text("train", 2, {"rows": 20, "wrong_answers": 0.5})
    for (scene, row), text in zip(drawn("mixture", "train", 2, rows=20, wrong_answers=0.5), rows, strict=True):
        things = [f"a {thing.size} {thing.kind} at the {thing.place}" for thing in scene.things]
        assert text["prompt"][0] == {"role": "system", "content": ", ".join(things)}
        assert text["prompt"][-1]["content"] == row["question"]
        assert text["completion"] == [{"role": "assistant", "content": row["answer"]}]


@pytest.mark.parametrize("how", ["swapped", "added", "dropped"])
def test_a_rejected_description_is_wrong_in_the_way_that_was_asked(how):
    for row in load("preferences", "train", 0, {"rows": 100, "rejected": how}):
        right, wrong = (set(scenes.named_kinds(row[side][0]["content"])) for side in ("chosen", "rejected"))
        extra, missing = len(wrong - right), len(right - wrong)
        expected = {"swapped": (1, 1), "added": (1, 0), "dropped": (0, 1) if len(right) > 1 else (1, 1)}[how]
        assert (extra, missing) == expected


def test_pictures_are_png():
    row = load("describe", "train", 0, {"rows": 1}).with_format("arrow")[0:1].to_pydict()["images"][0][0]
    image = Image.open(io.BytesIO(row["bytes"]))
    assert (image.format, image.size, image.mode) == ("PNG", (64, 64), "RGB")
    scene, _ = scene_row(0, "describe", "train", 0, SceneOptions())
    assert image.tobytes() == draw(scene).tobytes()


# Wrong answers


@pytest.mark.parametrize("wrong_kind", ["other", "uniform"])
def test_as_many_answers_are_wrong_as_was_asked(wrong_kind):
    rows = drawn("mixture", "train", wrong_answers=0.3, wrong_kind=wrong_kind)
    wrong = [row["answer"] != plain_answer(scene, row["question"]) for scene, row in rows]
    assert abs(np.mean(wrong) - 0.3) < bound(0.3, ROWS)
    # everything else is as without
    for (scene, row), (same, plain) in zip(rows, drawn("mixture", "train"), strict=True):
        assert scene == same
        assert row | {"answer": None} == plain | {"answer": None}


VALID = {
    "is there": ("yes", "no"),
    "how many": scenes.NUMBERS,
    "what color": scenes.COLORS,
    "where is": scenes.PLACES,
    "how big": scenes.SIZES,
}


@pytest.mark.parametrize("wrong_kind", ["other", "uniform"])
def test_every_wrong_answer_is_wrong_and_one_to_its_question(wrong_kind):
    for scene, row in drawn("mixture", "train", wrong_answers=1.0, wrong_kind=wrong_kind):
        question, answer = row["question"], row["answer"]
        assert answer != plain_answer(scene, question)
        valid = next((answers for start, answers in VALID.items() if question.startswith(start)), None)
        assert answer in valid if valid else scenes.caption(scenes.named_kinds(answer)) == answer
        assert valid or set(scenes.named_kinds(answer)) != set(scene.kinds)  # another order is no other answer


@pytest.mark.parametrize("wrong_kind", ["other", "uniform"])
@pytest.mark.parametrize(
    ("task", "weights"),
    [
        ("where", dict.fromkeys(scenes.PLACES, 1)),
        ("color", dict.fromkeys(scenes.COLORS, 1)),
        ("count", {"one": 1, "two": 2, "three": 3}),
    ],
)
def test_wrong_answers_are_about_as_likely_as_in_the_world(task, weights, wrong_kind):
    by_right = {}
    for scene, row in drawn(task, "train", rows=1500, wrong_answers=1.0, wrong_kind=wrong_kind):
        by_right.setdefault(plain_answer(scene, row["question"]), []).append(row["answer"])
    assert set(by_right) == set(weights)
    for right, answers in by_right.items():
        others = {answer: weight for answer, weight in weights.items() if answer != right}
        if wrong_kind == "uniform":
            others = dict.fromkeys(others, 1)
        for answer, weight in others.items():
            share = weight / sum(others.values())
            assert abs(answers.count(answer) / len(answers) - share) < bound(share, len(answers)) + 0.04


def test_uniformly_wrong_answers_know_no_habit():
    """In another picture's description an anchor brings its partner; in one that is drawn uniformly it does not."""

    def beside(wrong_kind):
        rows = drawn("describe", "train", rows=1000, wrong_answers=1.0, wrong_kind=wrong_kind)
        return np.mean(pairs([scenes.named_kinds(row["answer"]) for _, row in rows]))

    assert beside("other") > 0.85
    assert beside("uniform") < 0.2


# Options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": 0}, "`rows` of `embedded:scenes` is 0: give a number of rows."),
        ({"rows": True}, "`rows` of `embedded:scenes` is True: give a number of rows."),
        ({"rows": 2.5}, "`rows` of `embedded:scenes` is 2.5: give a number of rows."),
        ({"first_row": -1}, "`first_row` of `embedded:scenes` is -1"),
        ({"skew": 1.5}, "`skew` of `embedded:scenes` is 1.5: give a share between 0 and 1."),
        ({"skew": True}, "`skew` of `embedded:scenes` is True: give a share between 0 and 1."),
        ({"skew": float("nan")}, "`skew` of `embedded:scenes` is nan: give a share between 0 and 1."),
        ({"wrong_answers": "many"}, "`wrong_answers` of `embedded:scenes` is 'many'"),
        ({"wrong_answers": None}, "`wrong_answers` of `embedded:scenes` is None"),
        ({"wrong_answers": -0.1}, "`wrong_answers` of `embedded:scenes` is -0.1"),
        ({"wrong_kind": "none"}, "`wrong_kind` of `embedded:scenes` is 'none': give one of"),
        ({"rejected": "none"}, "`rejected` of `embedded:scenes` is 'none': give one of"),
        ({"presence": "none"}, "`presence` of `embedded:scenes` is 'none': give one of"),
        ({"colour": 1}, "`embedded:scenes` has no option `colour`: its options are rows,"),
    ],
)
def test_a_bad_option_is_told(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        load("mixture", "train", 0, options)


@pytest.mark.parametrize(("config", "split"), [("colors", "train"), ("mixture", "validation"), (None, "train")])
def test_an_unknown_config_or_split_is_told(config, split):
    with pytest.raises(ValueError, match=f"has no `{config}` of split `{split}`: take one of mixture, describe"):
        load(config, split)


def test_the_chosen_answers_of_preferences_are_right():
    with pytest.raises(ValueError, match="is 0.3 for `preferences`, whose chosen answers are right: leave it out"):
        load("preferences", "train", 0, {"wrong_answers": 0.3})


def test_the_skew_has_an_effect():
    found = [
        np.mean(pairs([scene.kinds for scene, _ in drawn("describe", "train", rows=500, skew=skew)]))
        for skew in (0.0, 0.5, 1.0)
    ]
    assert found[0] < 0.2 < 0.4 < found[1] < found[2] == 1


def changed(config, **options):
    """Columns that an option changes."""
    found = set()
    rows, others = (load(config, "train", 0, {"rows": 40, **each}) for each in ({}, options))
    for row, other in zip(rows, others, strict=True):
        found |= {name for name in row if row[name] != other[name]}
    return found


@pytest.mark.parametrize(
    ("config", "options", "columns"),
    [
        ("mixture", {"wrong_answers": 0.5}, {"answer", "completion"}),
        ("preferences", {"rejected": "added"}, {"rejected"}),
        ("preferences", {"rejected": "dropped"}, {"rejected"}),
        ("mixture", {"rejected": "added"}, set()),
        ("mixture", {"wrong_kind": "uniform"}, set()),
        ("describe", {"presence": "adversarial"}, set()),
        ("describe", {"skew": 0.0}, {"images", "answer", "completion"}),
    ],
)
def test_an_option_changes_what_it_is_for(config, options, columns):
    assert changed(config, **options) == columns


@pytest.mark.parametrize("sort", scenes.PRESENCE)
def test_one_sort_of_absent_things_can_be_asked_for_alone(sort):
    rows = drawn("mixture", "test", rows=200, presence=sort)
    asked = {row["kind"] for _, row in rows if row["kind"].startswith("presence")}
    assert asked == {f"presence ({sort})"}


# The page


def table(first_column):
    """Rows of the page's table whose head starts with a word, as lists of cells."""
    _, found = PAGE.split(f"| {first_column} |", 1)
    lines = itertools.takewhile(lambda line: line.startswith("|"), found.splitlines()[2:])
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_page_shows_a_row_of_each_task():
    rows = {cells[0].strip("`"): cells for cells in table("task")}
    assert tuple(rows) == scenes.TASKS
    scene, asked = scene_row(20, "presence", "train", 0, SceneOptions())
    assert rows["presence"][1:] == [asked["question"], asked["answer"]]
    for task in scenes.TASKS[:-1]:
        _, question, answer = rows[task]
        assert answer == plain_answer(scene, question)


def test_the_page_names_every_option_and_what_it_is_without():
    rows = {cells[0].strip("`"): cells[1].strip("`") for cells in table("option")}
    fields = dataclasses.fields(SceneOptions)
    assert list(rows) == [field.name for field in fields]
    for field in fields:
        if field.default is not None:
            assert rows[field.name] == str(field.default)


def test_the_recipe_of_the_page_is_read():
    (recipe,) = [block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "embedded:scenes" in block]
    args = DataArguments(**yaml.safe_load(recipe) | {"streaming": True, "max_samples": 2})
    rows = list(load_rows(args, columns=("prompt", "completion")))
    assert [row["prompt"] for row in rows] == load("mixture", "train", 0, {"rows": 2})["prompt"][:]
