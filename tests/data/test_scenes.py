"""The world of scenes: how often what comes together, what is asked, what is right, what training never sees."""

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest

from helpers.scenes import ROWS, bound, drawn, pairs, plain_answer
from llava_mod_hf.data import scenes
from llava_mod_hf.data.scene_pictures import CELL, CORNERS, PIXELS, RGB, draw
from llava_mod_hf.data.scenes import KINDS, PARTNERS, Scene, Thing


@pytest.fixture(scope="module", params=["train", "test"])
def described(request):
    return request.param, [scene for scene, _ in drawn("describe", request.param)]


# How scenes are drawn


def test_no_arrangement_of_the_test_is_in_training():
    found = {
        split: {scene.key for seed in (0, 1) for scene, _ in drawn("mixture", split, seed)}
        for split in ("train", "test")
    }
    assert len(found["test"]) > 1000
    assert not found["train"] & found["test"]


def test_an_arrangement_is_its_kinds_sizes_and_places():
    scene = Scene((Thing("red circle", "small", "top left"), Thing("blue square", "large", "top right")), 7)
    assert dataclasses.replace(scene, jitter=8).key == scene.key
    first, second = scene.things
    for change in ({"kind": "green circle"}, {"size": "large"}, {"place": "bottom left"}):
        assert dataclasses.replace(scene, things=(dataclasses.replace(first, **change), second)).key != scene.key


def test_a_partner_is_of_another_color_and_another_shape():
    assert sorted([*PARTNERS, *PARTNERS.values()]) == sorted(KINDS)
    for kind, partner in PARTNERS.items():
        assert not set(kind.split()) & set(partner.split())


def final_kinds(kinds, count, skew):
    """`{kinds of a scene: probability}`, by the rule: a kind with an absent partner brings it, or comes alone."""
    if len(kinds) == count:
        return {kinds: 1.0}
    free, following = set(KINDS) - kinds, Counter()
    for kind in free:
        if kind not in PARTNERS or PARTNERS[kind] in kinds:
            following[kinds | {kind}] += 1 / len(free)
            continue
        following[kinds | {kind}] += (1 - skew) / len(free)
        if len(kinds) + 2 <= count:  # otherwise another kind is drawn
            following[kinds | {kind, PARTNERS[kind]}] += skew / len(free)
    final = Counter()
    for then, weight in following.items():
        for each, share in final_kinds(then, count, skew).items():
            final[each] += weight / following.total() * share
    return final


def expected_pairs(skew):
    """Of the kinds with a partner, in scenes of two things and half as many again of three, how many are beside it."""
    anchors = beside = 0.0
    for count, weight in ((2, 2), (3, 3)):
        for kinds, share in final_kinds(frozenset(), count, skew).items():
            anchors += weight * share * sum(kind in PARTNERS for kind in kinds)
            beside += weight * share * sum(PARTNERS.get(kind) in kinds for kind in kinds)
    return beside / anchors


@pytest.mark.parametrize(("skew", "documented"), [(0.95, 0.93), (0.0, 0.15)])
def test_a_partner_comes_as_often_as_is_documented(skew, documented):
    expected = expected_pairs(skew)
    assert round(expected, 2) == documented
    found = pairs([scene.kinds for scene, _ in drawn("describe", "train", 1, skew=skew)])
    # 0.01: arrangements of the test are not drawn here
    assert abs(np.mean(found) - expected) < bound(expected, len(found)) + 0.01


def test_the_test_is_less_skewed_than_training(described):
    split, drawn_scenes = described
    found = pairs([scene.kinds for scene in drawn_scenes])
    expected = expected_pairs({"train": 0.95, "test": 0.0}[split])
    # 0.03: the arrangements of the test are few
    assert abs(np.mean(found) - expected) < bound(expected, len(found)) + 0.03


def test_places_sizes_and_numbers_are_balanced(described):
    _, drawn_scenes = described
    things = [thing for scene in drawn_scenes for thing in scene.things]
    for attribute, values in (("place", scenes.PLACES), ("size", scenes.SIZES)):
        counts = Counter(getattr(thing, attribute) for thing in things)
        assert set(counts) == set(values)
        expected = len(things) / len(values)
        assert max(abs(count - expected) for count in counts.values()) < 5 * np.sqrt(expected)
    numbers = Counter(len(scene.things) for scene in drawn_scenes)
    for number, share in ((1, 1 / 6), (2, 1 / 3), (3, 1 / 2)):
        assert abs(numbers[number] / ROWS - share) < bound(share, ROWS) + 0.03


def test_things_come_in_reading_order_and_once(described):
    for scene in described[1]:
        places = [scenes.PLACES.index(thing.place) for thing in scene.things]
        assert places == sorted(set(places))
        assert len(set(scene.kinds)) == len(scene.kinds)


def test_a_scene_is_redrawn_for_its_split_alone():
    rng = random.Random(0)
    assert all(scenes.draw_scene(rng, "test", 0.3).key % 5 == 0 for _ in range(50))


# What is asked, and what is right


@pytest.mark.parametrize("split", ["train", "test"])
def test_presence_is_balanced_and_asks_what_its_sort_says(split):
    by_sort = {}
    for scene, row in drawn("presence", split):
        (kind,) = scenes.named_kinds(row["question"])
        assert row["answer"] == ("yes" if kind in scene.kinds else "no")
        sort = row["kind"]
        by_sort.setdefault(sort, []).append(row["answer"] == "yes")
        if row["answer"] == "no" and sort == "presence (popular)":
            assert kind in PARTNERS.values()  # of which six there are, and in a scene three at most
        if row["answer"] == "no" and sort == "presence (adversarial)":
            assert kind in {PARTNERS.get(each) for each in scene.kinds} - {None, *scene.kinds}
    assert sorted(by_sort) == [f"presence ({sort})" for sort in sorted(scenes.PRESENCE)]
    for answers in by_sort.values():
        assert abs(np.mean(answers) - 0.5) < bound(0.5, len(answers))


@pytest.mark.parametrize("config", ["presence", "conversation"])
def test_adversarial_questions_are_of_scenes_that_miss_a_partner(config):
    for scene, row in drawn(config, "train", rows=200, presence="adversarial"):
        if row["question"].startswith("is there"):
            assert {PARTNERS.get(each) for each in scene.kinds} - {None, *scene.kinds}


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_is_that_of_the_scene(split):
    for scene, row in drawn("mixture", split):
        assert row["answer"] == plain_answer(scene, row["question"])
        for question, answer in row["turns"]:
            assert answer == plain_answer(scene, question)


def test_a_color_is_not_asked_for_where_two_things_have_it():
    scene = Scene((Thing("red circle", "small", "top left"), Thing("blue circle", "large", "top right")), 0)
    assert scenes.ask(scene, "color", random.Random(0)) is None


@pytest.mark.parametrize("task", ["conversation", "none"])
def test_what_is_no_task_is_told(task):
    scene = scenes.uniform_scene(random.Random(0))
    with pytest.raises(ValueError, match=f"Nothing is asked for the task `{task}`: take one of describe, presence"):
        scenes.ask(scene, task, random.Random(0))


def test_a_rejected_description_of_no_known_way_is_told():
    scene = scenes.uniform_scene(random.Random(0))
    with pytest.raises(ValueError, match="A description cannot be `turned`: take swapped, added or dropped."):
        scenes.rejected_caption(scene, "turned", random.Random(0))


def test_a_rejected_description_names_the_partner_that_is_missing():
    scene = Scene((Thing("red circle", "small", "top left"), Thing("blue triangle", "large", "top right")), 0)
    for how in ("swapped", "added"):
        for seed in range(20):
            found = scenes.named_kinds(scenes.rejected_caption(scene, how, random.Random(seed)))
            assert PARTNERS["red circle"] in found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("A Red Circle, a red circle and a BLUE square.", ["red circle", "blue square"]),
        ("red, circle; a purple circle; a red oval; redcircle; a red circles", []),
        ("a blue square and a red circle", ["blue square", "red circle"]),
    ],
)
def test_the_kinds_that_a_text_names(text, found):
    assert scenes.named_kinds(text) == found


def test_truth_is_present_things_less_absent_ones():
    row = {"answer": "a red circle and a blue square"}
    answers = [
        "a red circle",
        "a red circle and a green square",
        "A Blue Square and a red circle",
        "a blue square, a red circle and a red circle",
        "a green square and a green square",
        "nothing",
    ]
    assert scenes.score_by_truth(row, answers) == [1, 0, 2, 1, -2, 0]


# What is drawn


def coloured(pixels):
    """Where a pixel is no grey."""
    return np.ptp(pixels, axis=-1) > 40


@pytest.mark.parametrize("size", scenes.SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_thing_stays_in_its_cell_and_has_its_shape_color_and_size(kind, size):
    color, shape = kind.split()
    for place, (column, row) in CORNERS.items():
        for jitter in range(10):
            pixels = np.asarray(draw(Scene((Thing(kind, size, place),), jitter)), dtype=int)
            rows, columns = np.nonzero(coloured(pixels))
            assert row * CELL <= rows.min() <= rows.max() < (row + 1) * CELL
            assert column * CELL <= columns.min() <= columns.max() < (column + 1) * CELL
            centroid = pixels[round(rows.mean()), round(columns.mean())]
            assert min(RGB, key=lambda color: np.abs(centroid - RGB[color]).sum()) == color
            filled = len(rows) / (np.ptp(rows) + 1) / (np.ptp(columns) + 1)  # of the box around it
            shares = {"circle": 0.79, "square": 1.0, "triangle": 0.5}
            assert min(shares, key=lambda name: abs(filled - shares[name])) == shape
            # halfway between the largest small one and the smallest large one, in pixels
            limit = {"circle": 240, "square": 190, "triangle": 130}[shape]
            assert (len(rows) > limit) == (size == "large")


def test_a_picture_shows_its_things_and_no_others():
    for scene, _ in drawn("describe", "train", 3, rows=200):
        pixels = np.asarray(draw(scene), dtype=int)
        assert pixels.shape == (PIXELS, PIXELS, 3)
        there = {thing.place: thing.kind.split()[0] for thing in scene.things}
        for place, (column, row) in CORNERS.items():
            cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            found = cell[coloured(cell)]
            assert bool(len(found)) == (place in there)
            if len(found):
                mean = found.mean(axis=0)
                assert min(RGB, key=lambda color: np.abs(mean - RGB[color]).sum()) == there[place]


def test_pictures_of_one_arrangement_differ_by_their_jitter():
    things = (Thing("red circle", "small", "top left"),)
    pictures = [draw(Scene(things, jitter)).tobytes() for jitter in (0, 0, 1)]
    assert pictures[0] == pictures[1] != pictures[2]
