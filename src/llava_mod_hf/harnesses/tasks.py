"""What a harness asks, and how an answer counts: the rows of `evaluate`, and the metrics of `evaluation/metrics/`."""

import dataclasses
import functools
import json

from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as Picture
from trl import prepare_multimodal_messages

from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.formats import pictures_of
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.evaluation.asked_rows import asked_rows
from llava_mod_hf.evaluation.benchmarks import BENCHMARKS, check_names, counted, units
from llava_mod_hf.evaluation.metrics.synonyms import Synonyms

IMAGE = "<image>"  # where a picture stands in lm-eval's texts, whatever the model's own token

TEST = "test"  # the split's name in the harness, whichever split was read


OWN = {"prompt_suffix": None, "synonyms": None, "seed": 0}  # what a task takes beside the options of its rows


def read_options(given):
    """
    The rows of a task, by the options of `llava-mod evaluate`.

    Args:
        given (`dict`): those of [`~llava_mod_hf.data.arguments.DataArguments`], and `prompt_suffix`, `synonyms` and
            `seed` as in [`~llava_mod_hf.commands.evaluate.EvaluateCommand`].

    Returns:
        `tuple`: [`~llava_mod_hf.data.arguments.DataArguments`], and a `dict` of the others.

    Raises:
        ValueError: if a key is unknown, or the rows are not those of one data set.
    """
    known = [item.name for item in dataclasses.fields(DataArguments)]
    for name in given:
        if name not in (*known, *OWN):
            raise ValueError(f"`rows` has the unknown key `{name}`: the keys are {', '.join((*known, *OWN))}.")
    data_args = DataArguments(**{name: value for name, value in given.items() if name in known})
    if data_args.dataset_name is None:
        raise ValueError("`datasets` are several, and a task is of one: give `dataset_name`, a task for each.")
    if data_args.streaming:
        raise ValueError("`streaming` is true, and a task is of all rows: leave it out.")
    return data_args, {name: given.get(name, default) for name, default in OWN.items()}


def load(*, measure, default_rows, rows=None, **others):
    """
    The data set of a task, as lm-eval's `custom_dataset` and our task of lmms-eval take it.

    Args:
        measure (`str`): of [`~llava_mod_hf.evaluation.benchmarks.BENCHMARKS`].
        default_rows (`dict`): what [`read_options`] takes, in the task's file.
        rows (`dict`, *optional*): the same, by who runs it: beside the default ones, or in their place if they name a
            data set.
        others: what lm-eval hands over besides, such as the model's arguments.

    Returns:
        `datasets.DatasetDict`: of one split, [`TEST`]: `images`; `prompt` (messages, as JSON), and the same as texts,
        with [`IMAGE`] for each picture: `system`, `earlier` (questions and answers, as JSON) and `question`; `answer`,
        `row` (all other columns, as JSON), `measure` and `synonyms`.

    Raises:
        ValueError: if an option is wrong, or a row is not of the measure or cannot be asked.
    """
    check_names([measure])
    if BENCHMARKS[measure].prepare:
        raise ValueError(f"`{measure}` counts several rows together, and a harness scores each alone: use `evaluate`.")
    if BENCHMARKS[measure].judged:
        raise ValueError(f"`{measure}` asks a judge, which a harness does not bring along: use `evaluate`.")
    rows = rows or {}
    data_args, own = read_options(rows if "dataset_name" in rows else {**default_rows, **rows})
    if own["synonyms"] and "synonyms" not in BENCHMARKS[measure].options:
        raise ValueError(f"`synonyms` is `{own['synonyms']}`, which does nothing for `{measure}`: leave it out.")
    loaded = load_rows(
        data_args, split=data_args.dataset_test_split, columns=("prompt", "completion"), seed=own["seed"]
    )
    asked, texts = asked_rows(loaded, data_args, measures=[measure], prompt_suffix=own["prompt_suffix"])
    units(measure, texts, [""] * len(texts), synonyms=_synonyms(own["synonyms"]))  # before hours of answers
    pictures = asked.select_columns(["images"]).cast_column("images", List(Picture(decode=False)))["images"]
    pictures = [pictures_of(prompt, each or []) for prompt, each in zip(asked["prompt"], pictures, strict=True)]
    columns = {
        **_columns_of_turns(asked["prompt"], [len(each) for each in pictures]),
        "prompt": [json.dumps(prompt) for prompt in asked["prompt"]],
        "answer": list(asked["answer"]),
        "row": [json.dumps(text, default=str) for text in texts],
        "measure": [measure] * len(texts),
        "synonyms": [own["synonyms"] or ""] * len(texts),
    }
    features = Features({name: Value("string") for name in columns} | {"images": List(Picture())})
    return DatasetDict({TEST: Dataset.from_dict(columns | {"images": pictures}, features=features)})


def _columns_of_turns(prompts, pictures):
    """`system`, `earlier` and `question` of [`load`], of prompts and how many pictures each has."""
    found = {"system": [], "earlier": [], "question": []}
    for number, (prompt, count) in enumerate(zip(prompts, pictures, strict=True)):
        turns = _texts(prompt, count, f"Row {number}")
        system = turns.pop(0)[1] if turns[0][0] == "system" else ""
        roles, said = [role for role, _ in turns], [text for _, text in turns]
        if roles != [*["user", "assistant"] * (len(roles) // 2), "user"]:
            said_by = ", ".join(roles) or "nobody"
            raise ValueError(f"Row {number} has turns of {said_by}: a task takes `user` and `assistant` in turn.")
        earlier = [{"question": said[place], "answer": said[place + 1]} for place in range(0, len(said) - 1, 2)]
        for name, value in (("system", system), ("earlier", json.dumps(earlier)), ("question", said[-1])):
            found[name].append(value)
    return found


def _texts(prompt, pictures, where):
    """`[(role, text)]` of messages, with [`IMAGE`] for each picture, where the chat template will put them."""
    found = []
    for message in prompt:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if any(IMAGE in (part.get("text") or "") for part in parts):
            raise ValueError(f"{where} has `{IMAGE}` in a text, which stands for a picture: write it otherwise.")
        text = "".join(IMAGE if part.get("type") == "image" else part.get("text") or "" for part in parts)
        if isinstance(content, str) and message["role"] == "user":  # as TRL does, all before the first question
            text, pictures = IMAGE * pictures + text, 0
        found.append((message["role"], text))
    return found


def messages_of(doc):
    """A row of [`load`] as messages with their pictures, as `doc_to_messages` of lmms-eval."""
    messages = prepare_multimodal_messages(json.loads(doc["prompt"]), images=doc["images"])
    for message in messages:
        message["content"] = [
            {"type": "image", "url": part["image"]} if part["type"] == "image" else part for part in message["content"]
        ]
    return messages


def score(doc, results, **options):
    """
    What an answer adds to the figures of its task, as `process_results` of a harness.

    Args:
        doc (`dict`): a row of [`load`].
        results (`list[str]`): the answer to it, alone.

    Returns:
        `dict[str, tuple[float, float]]`: numerator and denominator of each figure, which
        [`~llava_mod_hf.evaluation.metrics.ratios.ratio`] sums up; none of a row that the measure leaves out.
    """
    (found,) = counted(doc["measure"], [json.loads(doc["row"])], results[:1], synonyms=_synonyms(doc["synonyms"]))
    return {figure: tuple(map(float, pair)) for figure, pair in found.items()}


@functools.cache
def _synonyms(path):
    return Synonyms.read(path) if path else None
