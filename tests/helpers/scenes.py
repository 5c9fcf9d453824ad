"""Rows of the scenes world without their pictures, and a second, plain reading of what is right."""

import random
import re

from llava_mod_hf.data import scenes
from llava_mod_hf.data.scene_rows import SceneOptions, scene_row

ROWS = 3000


def drawn(config, split, seed=0, rows=ROWS, **options):
    """`[(scene, row)]`."""
    options = SceneOptions(rows=rows, **options)
    return [scene_row(number, config, split, seed, options) for number in range(rows)]


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


def pairs(kinds_of_scenes):
    """Of each kind that has a partner, in scenes of several things, whether the partner is there."""
    several = [kinds for kinds in kinds_of_scenes if len(kinds) > 1]
    return [scenes.PARTNERS[kind] in kinds for kinds in several for kind in kinds if kind in scenes.PARTNERS]


def bound(share, count):
    """Four standard deviations of a share of `count` draws."""
    return 4 * (share * (1 - share) / count) ** 0.5


def described(right, seed=0, count=400):
    """Answered descriptions of a red circle, of which a share is right."""
    rng = random.Random(seed)
    return [
        {"question": f"{i}", "answer": "a red circle", "kind": "describe",
         "given": "a red circle" if rng.random() < right else "a red square"}
        for i in range(count)
    ]  # fmt: skip
