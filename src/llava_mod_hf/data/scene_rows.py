"""
Rows of the scenes world, drawn when they are made or read.

Row n of a seed is the same in every process and for every number of rows.
"""

import dataclasses
import functools
import random
from dataclasses import dataclass

from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as PillowImage

from llava_mod_hf.data.scene_pictures import draw, encode
from llava_mod_hf.data.scenes import (
    PRESENCE,
    TASKS,
    ask,
    describe_in_words,
    draw_scene,
    named_kinds,
    rejected_caption,
    uniform_scene,
)

DATASET = "embedded:scenes"

TEST_SKEW = 0.0

CONFIGS = ("mixture", *TASKS, "preferences", "prompts")

# share of each task in the mixture, in twentieths
MIXTURE = {"describe": 7, "presence": 6, "count": 1, "color": 1, "where": 1, "size": 1, "conversation": 3}


@dataclass(frozen=True)
class SceneOptions:
    """
    What world the rows are of.

    Args:
        rows (`int`, *optional*, defaults to 6000): how many; more rows begin with the same ones.
        first_row (`int`, *optional*, defaults to 0): where they begin.
        skew (`float`, *optional*):
            Probability that a kind brings its partner, if it has one, in scenes of several things; by default 0.95 in
            training and 0 in the test, where the two meet by chance. Kinds that would bring one into a scene that is
            full are drawn again: in the pictures 0.93 and 0.15 of them have it beside them.
        wrong_answers (`float`, *optional*, defaults to 0.0):
            Share of the rows whose answer is wrong; not of `preferences`, whose chosen answers are right.
        wrong_kind (`str`, *optional*, defaults to `"other"`):
            `"other"`: the answer to a question of that task about another picture, where it differs; `"uniform"`: the
            same of a picture without habits, in which kinds, numbers, places and sizes are as likely as each other. Of
            yes and no it is the other one.
        rejected (`str`, *optional*, defaults to `"swapped"`):
            What the rejected descriptions of `preferences` have: a thing `"swapped"` for one that is absent, one
            `"added"`, or one `"dropped"` (a single thing is swapped).
        presence (`str`, *optional*):
            Ask for absent things of one sort alone: `"random"`, `"popular"` (the most frequent kinds) or
            `"adversarial"` (the partner of what is there; scenes in which none is absent are drawn again). By default
            of any sort for which the scene has one.

    Raises:
        ValueError: if a value is none of those.
    """

    rows: int = 6000
    first_row: int = 0
    skew: float | None = None
    wrong_answers: float = 0.0
    wrong_kind: str = "other"
    rejected: str = "swapped"
    presence: str | None = None

    def __post_init__(self):
        for name in ("rows", "first_row"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (name == "rows"):
                raise ValueError(f"`{name}` of `{DATASET}` is {value!r}: give a number of rows.")
        shares = {"wrong_answers": self.wrong_answers} | ({} if self.skew is None else {"skew": self.skew})
        for name, value in shares.items():
            if isinstance(value, bool) or not (isinstance(value, int | float) and 0 <= value <= 1):
                raise ValueError(f"`{name}` of `{DATASET}` is {value!r}: give a share between 0 and 1.")
        choices = {
            "wrong_kind": ("other", "uniform"),
            "rejected": ("swapped", "added", "dropped"),
            "presence": (None, *PRESENCE),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` of `{DATASET}` is {getattr(self, name)!r}: give one of {known}.")


# how the questions of a task start
STARTS = {
    "describe the": "describe",
    "is there": "presence",
    "how many": "count",
    "what color": "color",
    "where is": "where",
    "how big": "size",
}


def _wrong_answer(question, answer, rng, options, split):
    """Another answer than the right one: what is right of another picture."""
    task = next(task for start, task in STARTS.items() if question.startswith(start))
    if task == "presence":
        return "no" if answer == "yes" else "yes"
    meaning = (lambda text: set(named_kinds(text))) if task == "describe" else str  # things in another order are right
    while True:
        scene = draw_scene(rng, split, _skew(options, split)) if options.wrong_kind == "other" else uniform_scene(rng)
        asked = ask(scene, task, rng)
        if asked is not None and meaning(asked[1]) != meaning(answer):
            return asked[1]


def _skew(options, split):
    if options.skew is not None:
        return options.skew
    return TEST_SKEW if split == "test" else 0.95


@functools.cache
def _tasks():
    return tuple(task for task, twentieths in MIXTURE.items() for _ in range(twentieths))


def scene_row(number, config, split, seed, options):
    """
    One row, without its picture.

    Args:
        number (`int`): of the row.
        config, split, seed, options: as for [`load`].

    Returns:
        `tuple[Scene, dict]`: the scene; `turns` (questions and answers so far), `question`, `answer`, `kind`.
    """
    # the prompts are the mixture's; no other two configs share their pictures
    rng = random.Random(f"{seed} {'mixture' if config == 'prompts' else config} {split} {number}")
    task = {"preferences": "describe", "mixture": None, "prompts": None}.get(config, config) or rng.choice(_tasks())
    last = rng.choice(("presence", "count", "where", "size")) if task == "conversation" else task
    asked = None
    while asked is None:
        scene = draw_scene(rng, split, _skew(options, split))
        asked = ask(scene, last, rng, options.presence)
    question, answer, kind = asked
    turns = []
    if task == "conversation":
        turns, kind = [ask(scene, "describe", rng)[:2]], task
    if rng.random() < options.wrong_answers:
        answer = _wrong_answer(question, answer, rng, options, split)
    return scene, {"turns": turns, "question": question, "answer": answer, "kind": kind}


def _message(role, content):
    return {"role": role, "content": content}


def _rows(config, split, seed, options):
    for number in range(options.first_row, options.first_row + options.rows):
        scene, row = scene_row(number, config, split, seed, options)
        prompt = [
            message
            for question, answer in row.pop("turns")
            for message in (_message("user", question), _message("assistant", answer))
        ]
        prompt.append(_message("user", row["question"]))
        answer = [_message("assistant", row["answer"])]
        found = {"images": [{"bytes": encode(draw(scene)), "path": None}], "prompt": prompt, **row}
        if config == "preferences":
            rng = random.Random(f"{seed} {split} {number} rejected")
            rejected = rejected_caption(scene, options.rejected, rng)
            found |= {"chosen": answer, "rejected": [_message("assistant", rejected)]}
        elif config != "prompts":
            found["completion"] = answer
        yield found


_MESSAGES = [{"role": Value("string"), "content": Value("string")}]


def load(config, split, seed=0, options=None, *, streaming=False):
    """
    Rows of the world, in TRL's formats.

    Args:
        config (`str`):
            `"mixture"` of all tasks, one of [`TASKS`], `"preferences"` (descriptions, a right and a wrong one) or
            `"prompts"` (the mixture's pictures and questions, for a teacher to answer).
        split (`"train"` or `"test"`).
        seed (`int`): another one is another world of the same kind.
        options ([`SceneOptions`] or `dict`, *optional*).
        streaming (`bool`, *optional*, defaults to `False`): draw each row when it is read.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if streamed: `images`, `prompt`, `completion` (or `chosen`,
        `rejected`, or neither), `question`, `answer`, `kind`.

    Raises:
        ValueError: if there is no such `config`, `split` or option.
    """
    if config not in CONFIGS or split not in ("train", "test"):
        raise ValueError(
            f"`{DATASET}` has no `{config}` of split `{split}`: take one of {', '.join(CONFIGS)}, and `train` or "
            "`test`."
        )
    options = scene_options(options)
    if config == "preferences" and options.wrong_answers:
        raise ValueError(
            f"`wrong_answers` of `{DATASET}` is {options.wrong_answers} for `preferences`, whose chosen answers are "
            "right: leave it out."
        )
    columns = {"preferences": ("chosen", "rejected"), "prompts": ()}.get(config, ("completion",))
    texts = dict.fromkeys(("question", "answer", "kind"), Value("string"))
    features = Features({"images": List(Image()), "prompt": _MESSAGES, **dict.fromkeys(columns, _MESSAGES), **texts})
    if streaming:
        arguments = {"config": config, "split": split, "seed": seed, "options": options}
        return IterableDataset.from_generator(_rows, features=features, gen_kwargs=arguments)
    rows = list(_rows(config, split, seed, options))
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def scene_options(options):
    """
    [`SceneOptions`] of what a recipe says.

    Raises:
        ValueError: if it names an option that there is not.
    """
    if isinstance(options, SceneOptions):
        return options
    known = [field.name for field in dataclasses.fields(SceneOptions)]
    unknown = [name for name in options or {} if name not in known]
    if unknown:
        raise ValueError(f"`{DATASET}` has no option `{unknown[0]}`: its options are {', '.join(known)}.")
    return SceneOptions(**(options or {}))


def picture(number, config, split, seed, options=None) -> PillowImage.Image:
    """The picture of a row."""
    return draw(scene_row(number, config, split, seed, scene_options(options))[0])


def load_text(split, seed=0, options=None):
    """
    The mixture with the scene in words in place of the picture.

    Returns:
        `datasets.Dataset`: `prompt`, `completion`.
    """
    options, rows = scene_options(options), []
    for number in range(options.first_row, options.first_row + options.rows):
        scene, row = scene_row(number, "mixture", split, seed, options)
        prompt = [_message("system", describe_in_words(scene))]
        for question, answer in row["turns"]:
            prompt += [_message("user", question), _message("assistant", answer)]
        prompt.append(_message("user", row["question"]))
        rows.append({"prompt": prompt, "completion": [_message("assistant", row["answer"])]})
    return Dataset.from_list(rows)
