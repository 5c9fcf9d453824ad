"""What a harness asks and how its answers count, without a harness: the rows and figures of `evaluate`."""

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from llava_mod_hf.data.scene_rows import load as load_scenes
from llava_mod_hf.evaluation.benchmarks import measure, units
from llava_mod_hf.evaluation.metrics.ratios import figures_of
from llava_mod_hf.harnesses import lm_eval, lmms_eval
from llava_mod_hf.harnesses.tasks import TEST, load, messages_of, score

FOLDERS = [Path(each.__file__).parent for each in (lm_eval, lmms_eval)]
TASKS = [path for folder in FOLDERS for path in sorted(folder.glob("*.yaml"))]
SCENES = {"dataset_name": "embedded:scenes", "dataset_config": "mixture", "dataset_options": {"rows": 24}}


def task(measure="exact_match", default_rows=SCENES, **rows):
    return load(measure=measure, default_rows=default_rows, rows=rows, pretrained="a model")[TEST]


class Loader(yaml.SafeLoader):
    pass


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def settings(path):
    """A task's file, with what it includes."""
    own = yaml.load(path.read_text(), Loader)
    return {**{k: v for name in own.pop("include", ()) for k, v in settings(path.parent / name).items()}, **own}


@pytest.fixture
def pope_file(tmp_path):
    scene = load_scenes("presence", "test", 0, {"rows": 2})
    rows = []
    for number, row in enumerate(scene):
        row["images"][0].save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": row["question"], "answer": "yes", "category": "popular"})
    (tmp_path / "pope.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pope.jsonl", scene


def test_the_rows_are_those_of_evaluate():
    rows, scenes = task(), load_scenes("mixture", "test", 0, {"rows": 24})
    assert list(rows["answer"]) == list(scenes["answer"])
    assert [row["images"][0].tobytes() for row in rows] == [row["images"][0].tobytes() for row in scenes]
    assert [json.loads(text) for text in rows["prompt"]] == list(scenes["prompt"])
    spoken = {1: [], 3: []}
    for row, prompt in zip(rows, scenes["prompt"], strict=True):
        spoken[len(prompt)].append((row["earlier"], row["question"]))
        assert row["system"] == ""
        first, *_ = prompt
        said = [{"question": f"<image>{first['content']}", "answer": prompt[1]["content"]}] if len(prompt) > 1 else []
        assert json.loads(row["earlier"]) == said
        assert row["question"] == ("" if said else "<image>") + prompt[-1]["content"]
    assert all(spoken.values())


def test_rows_of_the_command_line_stand_beside_the_tasks_own_or_in_their_place(pope_file):
    path, scene = pope_file
    assert len(task(max_samples=3)) == 3
    own = task("pope", dataset_name=str(path), prompt_suffix="Answer with yes or no.")
    assert list(own["question"]) == [f"<image>{row['question']}\nAnswer with yes or no." for row in scene]
    assert json.loads(own[0]["row"])["category"] == "popular"
    assert own[1]["images"][0].tobytes() == scene[1]["images"][0].tobytes()


def test_parts_and_a_system_prompt_keep_their_places(tmp_path):
    image = load_scenes("describe", "test", 0, {"rows": 1})[0]["images"][0]
    text = lambda said: {"type": "text", "text": said}  # noqa: E731
    prompt = [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [text("see"), {"type": "image"}, text("what?")]},
        {"role": "assistant", "content": [text("a circle")]},
        {"role": "user", "content": [text("its color?")]},
    ]
    completion = [{"role": "assistant", "content": [text("red")]}]
    Dataset.from_list([{"images": [image], "prompt": prompt, "completion": completion}]).to_parquet(
        tmp_path / "a.parquet"
    )
    (row,) = task(dataset_name=str(tmp_path / "a.parquet"))
    assert (row["system"], row["question"], row["answer"]) == ("Be brief.", "its color?", "red")
    assert json.loads(row["earlier"]) == [{"question": "see<image>what?", "answer": "a circle"}]


def test_pictures_of_texts_stand_before_the_first_question(tmp_path):
    image = load_scenes("describe", "test", 0, {"rows": 1})[0]["images"][0]
    prompt = [{"role": role, "content": said} for role, said in (("system", "Be brief."), ("user", "what?"))]
    row = {"images": [image, image], "prompt": prompt, "completion": [{"role": "assistant", "content": "red"}]}
    Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
    (row,) = task(dataset_name=str(tmp_path / "a.parquet"))
    assert (row["system"], row["question"]) == ("Be brief.", "<image><image>what?")


def test_messages_have_their_pictures():
    for row, scene in zip(task(), load_scenes("mixture", "test", 0, {"rows": 24}), strict=True):
        first, *more = messages_of(row)
        picture, text = first["content"]
        assert (picture["type"], picture["url"].tobytes()) == ("image", scene["images"][0].tobytes())
        said = [text["text"], *(part["text"] for message in more for part in message["content"])]
        assert said == [message["content"] for message in scene["prompt"]]


@pytest.mark.parametrize("name", ["exact_match", "pope", "chair"])
def test_an_answer_counts_as_in_evaluate(name, tmp_path):
    rows = task(name)
    given = [["yes", "a red circle and a blue square", row["answer"]][number % 3] for number, row in enumerate(rows)]
    found = [score(row, [answer]) for row, answer in zip(rows, given, strict=True)]
    texts = [json.loads(row["row"]) for row in rows]
    assert found == units(name, texts, given, synonyms=None)
    expected = measure([name], texts, given, synonyms=None)[name]
    assert figures_of(found) == {figure: each["value"] for figure, each in expected.items()}


def test_things_are_those_of_the_list(pope_file, tmp_path):
    (tmp_path / "list.txt").write_text("person, man\ndog, puppy\n")
    (row, _) = task("chair", dataset_name=str(pope_file[0]), synonyms=str(tmp_path / "list.txt"))
    assert score(row, ["a puppy and a red circle"]) == {"chair_s": (1, 1), "chair_i": (1, 1), "object_recall": (0, 0)}


@pytest.mark.parametrize("path", TASKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_task_lists_the_figures_of_its_measure(path):
    config = settings(path)
    assert config["task"] == f"llava_mod_{path.stem}"
    drawn = {} if path.stem == "easy_vqa" else {"dataset_options": {"rows": 60}}
    rows = load(**config["dataset_kwargs"], rows={"max_samples": 60, **drawn})[TEST]
    given = {figure for row in rows for figure in score(row, ["yes"])}
    listed = [entry["metric"] for entry in config["metric_list"]]
    assert set(listed) == given and len(listed) == len(given)
    assert {entry["aggregation"] for entry in config["metric_list"]} == {"llava_mod_hf.evaluation.metrics.ratios.ratio"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "multiple_choice"}, "`multiple_choice` counts several rows together"),
        ({"measure": "mmhal"}, "`mmhal` asks a judge, which a harness does not bring along"),
        ({"measure": "bleu"}, "`measures` names `bleu`, which there is not"),
        ({"measure": "vqa_accuracy"}, "Row 0 has no `answers`, which the measure `vqa_accuracy` reads"),
        ({"max_rows": 3}, "`rows` has the unknown key `max_rows`: the keys are dataset_name"),
        ({"streaming": True}, "`streaming` is true, and a task is of all rows"),
        ({"dataset_name": None, "datasets": ["a.json"]}, "`datasets` are several, and a task is of one"),
        ({"synonyms": "list.txt"}, "`synonyms` is `list.txt`, which does nothing for `exact_match`"),
        ({"prompt_suffix": "see <image>"}, "Row 0 has `<image>` in a text"),
        ({"dataset_config": "describe", "measure": "pope"}, "None of 24 rows is of the measure `pope`"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        task(**options)


def test_turns_in_another_order_are_refused(tmp_path):
    said = [{"role": role, "content": "what?"} for role in ("user", "user")]
    row = {"images": [], "prompt": said, "completion": [{"role": "assistant", "content": "red"}]}
    Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="Row 0 has turns of user, user: a task takes `user` and `assistant` in turn"):
        task(dataset_name=str(tmp_path / "a.parquet"))
