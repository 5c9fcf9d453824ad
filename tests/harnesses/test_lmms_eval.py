"""
Our model and tasks by lmms-eval: the answers and figures of `llava-mod evaluate`, question by question.

`make test-harnesses` runs these: lmms-eval lies in a folder of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from helpers.harnesses import SCENES, TOKENS
from llava_mod_hf.data.scene_rows import load as load_scenes
from llava_mod_hf.harnesses import lmms_eval as tasks
from llava_mod_hf.publishing.harness_results import read_harness_results

pytest.importorskip("lmms_eval", reason="`make test-harnesses` installs it in a folder of its own")
LlavaMod = pytest.importorskip("llava_mod_hf.harnesses.lmms_eval.model").LlavaMod

FOLDER = Path(tasks.__file__).parent
NAMES = {"scenes": "exact_match", "pope": "pope", "chair": "chair"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what an installation writes of `pyproject.toml`: its entry points."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    group = '"lmms_eval.models"'
    entries = re.search(rf"\[project.entry-points.{group}\]\n(.*?)\n\n", text, flags=re.DOTALL)[1].replace('"', "")
    folder = tmp_path_factory.mktemp("installed")
    info = folder / "llava_mod_hf-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llava-mod-hf\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[lmms_eval.models]\n{entries}\n")
    return folder


@pytest.mark.parametrize("batch_size", [1, 8])
def test_ones_own_rows_score_as_in_evaluate(student, measured, installed, tmp_path, batch_size):
    """By the command of docs/judging.md: a task file of one's own includes one of ours, and says which rows."""
    folder = student("embedded:scenes-teacher")
    ours = measured(folder, list(NAMES.values()), **SCENES)
    for name, measure in NAMES.items():
        settings = {"include": str(FOLDER / f"{name}.yaml"), "task": f"own_{name}"}
        settings["dataset_kwargs"] = {"measure": measure, "default_rows": SCENES}
        (tmp_path / f"own_{name}.yaml").write_text(yaml.safe_dump(settings))
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "llava_mod", "--batch_size", str(batch_size)),
        *("--model_args", f"pretrained={folder},trust_remote_code=True", "--include_path", str(tmp_path)),
        *("--tasks", ",".join(f"own_{name}" for name in NAMES), "--gen_kwargs", f"max_new_tokens={TOKENS}"),
        *("--output_path", str(tmp_path / "out"), "--log_samples"),
    ]
    path = os.pathsep.join([str(installed), *sys.path])
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path, "HF_DATASETS_OFFLINE": "1"})
    (results,) = (tmp_path / "out").glob("*/*_results.json")
    found = json.loads(results.read_text())["results"]
    for name, measure in NAMES.items():
        (samples,) = (tmp_path / "out").glob(f"*/*_samples_own_{name}.jsonl")
        samples = [json.loads(line) for line in samples.read_text().splitlines()]
        assert [sample["filtered_resps"] for sample in samples] == [answer.strip() for answer in ours.answers]
        figures = ours.figures[measure]
        assert {figure: found[f"own_{name}"][f"{figure},none"] for figure in figures} == figures
    assert len(set(ours.answers)) > 3
    told = read_harness_results([str(tmp_path)], [str(folder)])
    assert {(each.task, each.metric): each.value for each in told} == {
        (f"own_{name}", figure): value
        for name, measure in NAMES.items()
        for figure, value in ours.figures[measure].items()
        if value is not None
    }
    assert {(each.harness.split()[0], each.dataset) for each in told} == {("lmms-eval", "embedded:scenes")}


@pytest.fixture(scope="module")
def model(student):
    return LlavaMod(str(student("embedded:scenes-teacher")), batch_size="3", trust_remote_code=True)


def request(place, **options):
    return SimpleNamespace(args=("", lambda doc: doc, options, place, "task", "test"))


def messages(*parts):
    return [
        {"role": "user", "content": [{"type": kind, ("text" if kind == "text" else "url"): x} for kind, x in parts]}
    ]


def test_answers_come_back_in_the_order_of_the_requests(model, tmp_path):
    scenes = load_scenes("describe", "test", 0, {"rows": 5})
    docs = [messages(("image", row["images"][0]), ("text", row["question"])) for row in scenes]
    scenes[0]["images"][0].save(tmp_path / "a.png")
    docs.append(messages(("image", str(tmp_path / "a.png")), ("text", scenes[0]["question"])))
    model.task_dict = {"task": {"test": docs}}
    whole = model.generate_until([request(place, max_new_tokens=TOKENS) for place in range(6)])
    assert whole[5] == whole[0] and len(set(whole)) > 2
    some = [request(place, max_new_tokens=TOKENS, until=["" if place % 2 else " and"]) for place in range(5)]
    cut = [answer if place % 2 else answer.split(" and")[0] for place, answer in enumerate(whole[:5])]
    assert model.generate_until(some) == cut != whole[:5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.7}, "`generation_kwargs` have `temperature` 0.7, and answers are greedy"),
        ({"do_sample": True}, "`do_sample` True"),
        ({"num_beams": 2}, "`num_beams` 2"),
        ({"repetition_penalty": 1.2}, "`repetition_penalty` 1.2"),
    ],
)
def test_other_answers_than_greedy_ones_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate_until([request(0, **options)])


def test_videos_are_refused(model):
    model.task_dict = {"task": {"test": [messages(("video", "a.mp4"), ("text", "what?"))]}}
    with pytest.raises(ValueError, match="Row 0 of `task` has a video or a sound"):
        model.generate_until([request(0)])


@pytest.mark.parametrize("options", [{"batch_size": "auto"}, {"batch_size": 0}, {"max_batch_size": 8}])
def test_a_batch_size_that_is_not_given_is_refused(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"`{name}` is `?{value}"):
        LlavaMod("embedded:tiny-teacher", **options)
