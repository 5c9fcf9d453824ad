"""
The embedded world of scenes: pictures of one to three coloured shapes, and what can be asked about them.

A scene has things of 12 kinds (4 colours × 3 shapes), each small or large, in the cells of a 2×2 grid. In training half
of the kinds come with a fixed partner nearly always, in the test by chance alone: a model that has learnt the habit and
does not look names the partner where it is absent, which is what POPE's adversarial questions and CHAIR measure on
photographs.

One arrangement in five (kinds, sizes and cells) belongs to the test alone. `scene_rows.py` makes data sets of it.
"""

import re
import zlib
from collections import Counter
from dataclasses import dataclass

COLORS = ("red", "green", "blue", "yellow")

SHAPES = ("circle", "square", "triangle")

SIZES = ("small", "large")

PLACES = ("top left", "top right", "bottom left", "bottom right")

NUMBERS = ("one", "two", "three")

KINDS = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)

# each kind of the first half has its partner in the second, of another colour and another shape
PARTNERS = {kind: KINDS[(5 * place + 1) % 6 + 6] for place, kind in enumerate(KINDS[:6])}

TASKS = ("describe", "presence", "count", "color", "where", "size", "conversation")

PRESENCE = ("random", "popular", "adversarial")

DESCRIBE = "describe the picture."


@dataclass(frozen=True)
class Thing:
    """One of [`KINDS`], in one of [`SIZES`], at one of [`PLACES`]."""

    kind: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """Things in reading order of their places, and the number that the small variations of its picture are drawn by."""

    things: tuple
    jitter: int

    @property
    def kinds(self):
        return [thing.kind for thing in self.things]

    @property
    def key(self):
        """Hash of the arrangement: kinds, sizes and places, not the jitter."""
        text = ";".join(f"{thing.kind},{thing.size},{thing.place}" for thing in self.things)
        return zlib.crc32(text.encode())


# how many things: three more often than two, two more often than one
COUNTS = (1, 2, 2, 3, 3, 3)


def _draw_things(rng, skew, counts=COUNTS):
    """
    Things whose kinds are drawn one by one: one with an absent partner brings it with probability `skew`, or else the
    partner may still come by chance. Where there is no room for both, another kind is drawn. Of the kinds with a
    partner, 93 % have it beside them at 0.95, 15 % at 0.
    """
    count = rng.choice(counts)
    kinds: list[str] = []
    while len(kinds) < count:
        kind = rng.choice([kind for kind in KINDS if kind not in kinds])
        partner = PARTNERS.get(kind)
        if count == 1 or partner is None or partner in kinds or rng.random() >= skew:
            kinds.append(kind)
        elif len(kinds) + 2 <= count:
            kinds += [kind, partner]
        # else there is no room for both, and another kind is drawn
    places = sorted(rng.sample(range(len(PLACES)), count))
    rng.shuffle(kinds)
    return tuple(Thing(kind, rng.choice(SIZES), PLACES[place]) for kind, place in zip(kinds, places, strict=True))


def draw_scene(rng, split, skew):
    """A scene of a split: arrangements of the other one are drawn again."""
    while True:
        scene = Scene(_draw_things(rng, skew), rng.getrandbits(32))
        if (scene.key % 5 == 0) == (split == "test"):
            return scene


def uniform_scene(rng):
    """A scene of either split, in which partners meet by chance alone, and one thing is as likely as two or three."""
    return Scene(_draw_things(rng, 0.0, (1, 2, 3)), 0)


def caption(kinds):
    """A description in one sentence: `a red circle, a blue square and a green triangle`."""
    names = [f"a {kind}" for kind in kinds]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


MENTION = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b", re.IGNORECASE)


def mentions(text):
    """The kinds that a text names, as often as it names them, in its order."""
    return [match[0].lower() for match in MENTION.finditer(text)]


def named_kinds(text):
    """The kinds that a text names, each once, in order of their first mention."""
    return list(dict.fromkeys(mentions(text)))


def _ask_presence(scene, rng, sort):
    """A question of presence: half of them of a thing that is there, the others of an absent one of the sort."""
    absent = [kind for kind in KINDS if kind not in scene.kinds]
    candidates = {
        "random": absent,
        "popular": [kind for kind in absent if kind in PARTNERS.values()],  # what comes more often than others
        "adversarial": [PARTNERS[kind] for kind in scene.kinds if PARTNERS.get(kind) in absent],
    }
    sort = sort or rng.choice([sort for sort in PRESENCE if candidates[sort]])
    if not candidates[sort]:
        return None
    kinds, answer = rng.choice([(scene.kinds, "yes"), (candidates[sort], "no")])
    return f"is there a {rng.choice(kinds)}?", answer, f"presence ({sort})"


def ask(scene, task, rng, sort=None):
    """
    A question about a scene.

    Args:
        scene ([`Scene`]).
        task (`str`): one of [`TASKS`], but for `"conversation"`, which is made of the others.
        rng (`random.Random`).
        sort (`str`, *optional*): which absent things are asked for, one of [`PRESENCE`]; by default any.

    Returns:
        `tuple[str, str, str]` or `None`: question, answer and kind; `None` if the scene has nothing to ask for: the
        shape whose colour is asked for is there twice, or no partner is absent for an adversarial question.

    Raises:
        ValueError: if there is no such task.
    """
    thing = rng.choice(scene.things)
    if task == "describe":
        return DESCRIBE, caption(scene.kinds), task
    if task == "presence":
        return _ask_presence(scene, rng, sort)
    if task == "count":
        return "how many shapes are there?", NUMBERS[len(scene.things) - 1], task
    if task == "where":
        return f"where is the {thing.kind}?", thing.place, task
    if task == "size":
        return f"how big is the {thing.kind}?", thing.size, task
    if task == "color":
        shapes = Counter(kind.split()[1] for kind in scene.kinds)
        color, shape = thing.kind.split()
        return (f"what color is the {shape}?", color, task) if shapes[shape] == 1 else None
    raise ValueError(f"Nothing is asked for the task `{task}`: take one of {', '.join(TASKS[:-1])}.")


def rejected_caption(scene, how, rng):
    """
    A wrong description; what it names too much is the absent partner of a thing, if there is one.

    Args:
        scene ([`Scene`]).
        how (`str`):
            `"swapped"`: an absent thing in the place of one; `"added"`: an absent thing more; `"dropped"`: a thing
            less, but of a single thing, which cannot be left out, swapped.
        rng (`random.Random`).

    Raises:
        ValueError: if there is no such way.
    """
    kinds = list(scene.kinds)
    absent = [kind for kind in KINDS if kind not in kinds]
    expected = [PARTNERS[kind] for kind in kinds if PARTNERS.get(kind) in absent]
    other = rng.choice(expected or absent)
    place = rng.randrange(len(kinds))
    if how == "swapped":
        kinds[place] = other
    elif how == "added":
        kinds.insert(rng.randrange(len(kinds) + 1), other)
    elif how == "dropped":
        kinds[place : place + 1] = [] if len(kinds) > 1 else [other]
    else:
        raise ValueError(f"A description cannot be `{how}`: take swapped, added or dropped.")
    return caption(kinds)


def score_by_truth(row, answers):
    """
    How good descriptions are, for `llava-mod make-preferences`: present things named, less mentions of absent ones and
    of what was named already.

    Args:
        row (`dict`): with `answer`, the right description.
        answers (`list[str]`).

    Returns:
        `list[int]`.
    """
    there = set(named_kinds(row["answer"]))
    found = [mentions(answer) for answer in answers]
    return [2 * len(there & set(named)) - len(named) for named in found]


def describe_in_words(scene):
    """Everything that is in a scene, for models that see no picture: `a small red circle at the top left, …`."""
    return ", ".join(f"a {thing.size} {thing.kind} at the {thing.place}" for thing in scene.things)


def words():
    """Everything that the world says, a text each: what its tokenizer is trained on."""
    texts = [DESCRIBE, "how many shapes are there?", *NUMBERS, *PLACES, *SIZES, *COLORS, "yes", "no"]
    for kind in KINDS:
        shape = kind.split()[1]
        texts += [f"is there a {kind}?", f"where is the {kind}?", f"how big is the {kind}?"]
        texts += [f"what color is the {shape}?", f"a {kind} and a {kind}, a {kind}"]
        texts += [f"a {size} {kind} at the {place}, a" for size in SIZES for place in PLACES]
    return texts
