"""The world of scenes: what is drawn, what is asked, what is right, and what training never sees."""

import io
import random
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from llava_mod_hf.data import scenes
from llava_mod_hf.data.scene_pictures import CELL, CORNERS, RGB, draw
from llava_mod_hf.data.scene_rows import SceneOptions, load, load_text, picture, scene_row

ROWS = 3000


def drawn(config, split, seed=0, rows=ROWS, **options):
    options = SceneOptions(rows=rows, **options)
    return [scene_row(number, config, split, seed, options) for number in range(rows)]


@pytest.fixture(scope="module", params=["train", "test"])
def described(request):
    return request.param, [scene for scene, _ in drawn("describe", request.param)]


def test_no_arrangement_of_the_test_is_in_training():
    found = {
        split: {scene.key for seed in (0, 1) for scene, _ in drawn("mixture", split, seed)}
        for split in ("train", "test")
    }
    assert len(found["test"]) > 1000
    assert not found["train"] & found["test"]


def test_a_partner_comes_as_often_as_is_said(described):
    """In scenes of several things an anchor is alone with probability 1 − skew; redrawing for room thins the pairs."""
    split, drawn_scenes = described
    several = [scene.kinds for scene in drawn_scenes if len(scene.kinds) > 1]
    pairs = [scenes.PARTNERS[kind] in kinds for kinds in several for kind in kinds if kind in scenes.PARTNERS]
    low, high = {"train": (0.88, 0.96), "test": (0.22, 0.33)}[split]
    assert low < np.mean(pairs) < high


def test_places_sizes_and_numbers_are_balanced(described):
    _, drawn_scenes = described
    things = [thing for scene in drawn_scenes for thing in scene.things]
    for attribute, values in (("place", scenes.PLACES), ("size", scenes.SIZES)):
        counts = Counter(getattr(thing, attribute) for thing in things)
        assert set(counts) == set(values)
        expected = len(things) / len(values)
        assert max(abs(count - expected) for count in counts.values()) < 5 * np.sqrt(expected)
    numbers = Counter(len(scene.things) for scene in drawn_scenes)
    assert numbers[3] > numbers[2] > numbers[1] > 0.1 * ROWS


@pytest.mark.parametrize("split", ["train", "test"])
def test_presence_is_balanced_and_asks_what_its_sort_says(split):
    by_sort = {}
    for scene, row in drawn("presence", split):
        (kind,) = scenes.named_kinds(row["question"])
        assert row["answer"] == ("yes" if kind in scene.kinds else "no")
        sort = row["kind"]
        by_sort.setdefault(sort, []).append(row["answer"] == "yes")
        if row["answer"] == "no" and sort == "presence (popular)":
            assert kind in scenes.PARTNERS.values() or set(scenes.PARTNERS.values()) <= set(scene.kinds)
        if row["answer"] == "no" and sort == "presence (adversarial)":
            expected = {scenes.PARTNERS.get(each) for each in scene.kinds} - {None, *scene.kinds}
            assert not expected or kind in expected
    assert sorted(by_sort) == [f"presence ({sort})" for sort in sorted(scenes.PRESENCE)]
    for answers in by_sort.values():
        assert abs(np.mean(answers) - 0.5) < 4 * 0.5 / np.sqrt(len(answers))


def plain_answer(scene, question):
    """The right answer, worked out anew from the things alone."""
    if question == scenes.DESCRIBE:
        names = ["a " + thing.kind for thing in scene.things]
        return {1: "{}", 2: "{} and {}", 3: "{}, {} and {}"}[len(names)].format(*names)
    if question == "how many shapes are there?":
        return ["", "one", "two", "three"][len(scene.things)]
    if match := re.fullmatch(r"is there a (.*)\?", question):
        return "yes" if match[1] in [thing.kind for thing in scene.things] else "no"
    if match := re.fullmatch(r"what color is the (.*)\?", question):
        (found,) = [thing.kind.split()[0] for thing in scene.things if thing.kind.endswith(match[1])]
        return found
    word, kind = re.fullmatch(r"(where is|how big is) the (.*)\?", question).groups()
    (thing,) = [thing for thing in scene.things if thing.kind == kind]
    return thing.place if word == "where is" else thing.size


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_is_that_of_the_scene(split):
    kinds = Counter()
    for scene, row in drawn("mixture", split):
        assert row["answer"] == plain_answer(scene, row["question"])
        for question, answer in row["turns"]:
            assert answer == plain_answer(scene, question)
        kinds[row["kind"].split(" (")[0]] += 1
    assert set(kinds) == set(scenes.TASKS)


@pytest.mark.parametrize("wrong_kind", ["other", "uniform"])
def test_as_many_answers_are_wrong_as_was_asked(wrong_kind):
    rows = drawn("mixture", "train", wrong_answers=0.3, wrong_kind=wrong_kind)
    wrong = [row["answer"] != plain_answer(scene, row["question"]) for scene, row in rows]
    assert abs(np.mean(wrong) - 0.3) < 4 * np.sqrt(0.21 / ROWS)
    valid = {
        "is there": ("yes", "no"), "how many": scenes.NUMBERS, "what color": scenes.COLORS,
        "where is": scenes.PLACES, "how big": scenes.SIZES,
    }  # fmt: skip
    for _, row in rows:  # a wrong answer is still one to that question
        expected = next((found for start, found in valid.items() if row["question"].startswith(start)), None)
        assert row["answer"] in expected if expected else scenes.named_kinds(row["answer"])
    # everything else is as without
    same = [(row["question"], row["kind"]) for _, row in drawn("mixture", "train")]
    assert [(row["question"], row["kind"]) for _, row in rows] == same


def test_uniformly_wrong_answers_know_no_habit():
    """In another picture's description an anchor brings its partner; in one that is drawn uniformly it does not."""

    def pairs(wrong_kind):
        rows = drawn("describe", "train", wrong_answers=1.0, wrong_kind=wrong_kind)
        named = [scenes.named_kinds(row["answer"]) for _, row in rows]
        return np.mean([
            scenes.PARTNERS[kind] in kinds
            for kinds in named if len(kinds) > 1 for kind in kinds if kind in scenes.PARTNERS
        ])  # fmt: skip

    assert pairs("other") > 0.85
    assert pairs("uniform") < 0.2


def test_each_thing_is_drawn_in_its_place_and_colour():
    for number in range(200):
        scene, _ = scene_row(number, "describe", "train", 3, SceneOptions())
        pixels = np.asarray(draw(scene), dtype=int)
        background = pixels.max(axis=(0, 1))[0]
        for place, (column, row) in CORNERS.items():
            cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            coloured = cell[np.ptp(cell, axis=-1) > 40]
            expected = [thing for thing in scene.things if thing.place == place]
            if not expected:
                assert len(coloured) == 0, (number, place, background)
                continue
            mean = coloured.mean(axis=0)
            nearest = min(RGB, key=lambda color: np.abs(mean - RGB[color]).sum())
            assert nearest == expected[0].kind.split()[0]
            # halfway between the largest small one and the smallest large one, in pixels
            limit = {"circle": 240, "square": 190, "triangle": 130}[expected[0].kind.split()[1]]
            large = len(coloured) > limit
            assert large == (expected[0].size == "large"), (number, len(coloured), expected[0])


def test_a_row_is_the_same_however_it_is_read():
    options = {"rows": 12, "wrong_answers": 0.5}
    rows = load("mixture", "train", 5, options)
    later = load("mixture", "train", 5, {**options, "rows": 4, "first_row": 8})
    streamed = list(load("mixture", "train", 5, options, streaming=True))
    for place, row in enumerate(rows):
        assert {name: value for name, value in row.items() if name != "images"} == {
            name: value for name, value in streamed[place].items() if name != "images"
        }
        assert row["images"][0].tobytes() == streamed[place]["images"][0].tobytes()
    assert later["question"] == rows["question"][8:]
    assert later["answer"] == rows["answer"][8:]
    assert load("mixture", "train", 6, options)["answer"] != rows["answer"]
    assert picture(3, "mixture", "train", 5, options).tobytes() == rows[3]["images"][0].tobytes()


def test_prompts_have_no_answer_and_conversations_have_a_turn_before():
    assert "completion" not in load("prompts", "train", 0, {"rows": 3}).column_names
    for row in load("conversation", "test", 0, {"rows": 5}):
        assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
        assert row["prompt"][-1]["content"] == row["question"]


def test_text_says_the_scene_in_words():
    scene, _ = scene_row(0, "mixture", "train", 0, SceneOptions())
    words = load_text("train", 0, {"rows": 2})[0]["prompt"][0]["content"]
    for thing in scene.things:
        assert f"a {thing.size} {thing.kind} at the {thing.place}" in words


@pytest.mark.parametrize("how", ["swapped", "added", "dropped"])
def test_a_rejected_description_is_wrong_in_the_way_that_was_asked(how):
    for row in load("preferences", "train", 0, {"rows": 100, "rejected": how}):
        right, wrong = (set(scenes.named_kinds(row[side][0]["content"])) for side in ("chosen", "rejected"))
        extra, missing = len(wrong - right), len(right - wrong)
        expected = {"swapped": (1, 1), "added": (1, 0), "dropped": (0, 1) if len(right) > 1 else (1, 1)}[how]
        assert (extra, missing) == expected


def test_truth_is_present_things_less_absent_ones():
    row = {"answer": "a red circle and a blue square"}
    answers = [
        "a red circle",
        "a red circle and a green square",
        "A Blue Square, a red circle and a red circle",
        "nothing",
    ]
    assert scenes.score_by_truth(row, answers) == [1, 0, 2, 0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": 0}, "`rows` of `embedded:scenes` is 0: give a number of rows."),
        ({"first_row": -1}, "`first_row` of `embedded:scenes` is -1"),
        ({"skew": 1.5}, "`skew` of `embedded:scenes` is 1.5: give a share between 0 and 1."),
        ({"wrong_answers": "many"}, "`wrong_answers` of `embedded:scenes` is 'many'"),
        ({"wrong_kind": "none"}, "`wrong_kind` of `embedded:scenes` is 'none': give one of"),
        ({"rejected": "none"}, "`rejected` of `embedded:scenes` is 'none': give one of"),
        ({"presence": "none"}, "`presence` of `embedded:scenes` is 'none': give one of"),
        ({"colour": 1}, "`embedded:scenes` has no option `colour`: its options are rows,"),
    ],
)
def test_a_bad_option_is_told(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        load("mixture", "train", 0, options)


def test_an_unknown_config_is_told():
    with pytest.raises(ValueError, match="has no `colors` of split `train`: take one of mixture, describe"):
        load("colors", "train")


def test_skew_and_presence_have_an_effect():
    def pairs(skew):
        found = [scene.kinds for scene, _ in drawn("describe", "train", rows=500, skew=skew) if len(scene.kinds) > 1]
        return np.mean([scenes.PARTNERS[kind] in kinds for kinds in found for kind in kinds if kind in scenes.PARTNERS])

    assert pairs(0.0) < 0.15 < 0.4 < pairs(0.5) < pairs(1.0) == 1
    asked = {row["kind"] for _, row in drawn("presence", "train", rows=50, presence="popular")}
    assert asked == {"presence (popular)"}


def test_pictures_are_png():
    row = load("describe", "train", 0, {"rows": 1}).with_format("arrow")[0:1].to_pydict()["images"][0][0]
    image = Image.open(io.BytesIO(row["bytes"]))
    assert (image.format, image.size, image.mode) == ("PNG", (64, 64), "RGB")


def test_a_scene_is_redrawn_for_its_split_alone():
    rng = random.Random(0)
    assert all(scenes.draw_scene(rng, "test", 0.3).key % 5 == 0 for _ in range(50))
