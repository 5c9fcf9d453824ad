"""
Our tasks by lm-eval's own `hf-multimodal`: the answers and figures of `llava-mod evaluate`, question by question.

`make test-harnesses` runs these: lm-eval lies in a folder of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.harnesses import SCENES, TOKENS
from llava_mod_hf.evaluation.metrics.ratios import figures_of
from llava_mod_hf.harnesses import lm_eval as tasks
from llava_mod_hf.publishing.harness_results import read_harness_results

lm_eval = pytest.importorskip("lm_eval", reason="`make test-harnesses` installs it in a folder of its own")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

FOLDER = str(Path(tasks.__file__).parent)
EASY_VQA = {"dataset_name": "embedded:easy-vqa", "dataset_config": "questions", "max_samples": 4}
SCENES_TEACHER, TINY_TEACHER = "embedded:scenes-teacher", "embedded:tiny-teacher"


def figures(results):
    """Those of a task, without what lm-eval writes beside them."""
    return {name.removesuffix(",none"): value for name, value in results.items() if name.endswith(",none")
            and not name.endswith("_stderr,none")}  # fmt: skip


def by_lm_eval(student, names, rows, batch_size):
    manager = TaskManager(include_path=FOLDER, include_defaults=False, metadata={"rows": rows})
    return lm_eval.simple_evaluate(
        model="hf-multimodal",
        model_args=f"pretrained={student},dtype=float32,trust_remote_code=True",
        tasks=names,
        task_manager=manager,
        batch_size=batch_size,
        device="cpu",
        apply_chat_template=True,
        gen_kwargs=f"max_gen_toks={TOKENS}",
        bootstrap_iters=0,
    )


def same(found, task, ours, name):
    """Whether every answer, what it counts and the figures are ours."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"] for sample in samples] == [[answer] for answer in ours.answers]
    counted = [{figure: sample[figure] for figure in sample["metrics"]} for sample in samples]
    assert figures_of(counted) == ours.figures[name]
    assert figures(found["results"][task]) == ours.figures[name]
    return True


@pytest.fixture(scope="module")
def ours(student, measured):
    """What `evaluate` says of both worlds, by the student that knows something of each."""
    scenes, tiny = student(SCENES_TEACHER), student(TINY_TEACHER)
    return measured(scenes, ["exact_match", "pope", "chair"], **SCENES), measured(tiny, ["exact_match"], **EASY_VQA)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_embedded_worlds_score_as_in_evaluate(student, ours, batch_size):
    scenes, easy_vqa = ours
    names = {"llava_mod_scenes": "exact_match", "llava_mod_pope": "pope", "llava_mod_chair": "chair"}
    rows = {"dataset_options": SCENES["dataset_options"]}
    found = by_lm_eval(student(SCENES_TEACHER), list(names), rows, batch_size)
    assert all(same(found, task, scenes, name) for task, name in names.items())
    assert 0 < scenes.figures["exact_match"]["exact_match"] < 1 and len(set(scenes.answers)) > 5
    rows = {"max_samples": EASY_VQA["max_samples"]}
    found = by_lm_eval(student(TINY_TEACHER), ["llava_mod_easy_vqa"], rows, batch_size)
    assert same(found, "llava_mod_easy_vqa", easy_vqa, "exact_match")
    assert easy_vqa.figures["exact_match"]["exact_match"] > 0


@pytest.mark.parametrize("name", ["pope", "chair"])
def test_ones_own_rows_score_as_in_evaluate(student, measured, local, name, tmp_path):
    """By the command of docs/judging.md."""
    more = {"prompt_suffix": "Briefly."} | ({"synonyms": str(local / "list.txt")} if name == "chair" else {})
    folder = student(SCENES_TEACHER)
    ours = measured(folder, [name], dataset_name=str(local / f"{name}.jsonl"), **more)
    rows = {"dataset_name": str(local / f"{name}.jsonl"), **more}
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf-multimodal", "--device", "cpu", "--batch_size", "4"),
        *("--model_args", f"pretrained={folder},dtype=float32,trust_remote_code=True", "--apply_chat_template"),
        *("--include_path", FOLDER, "--tasks", f"llava_mod_{name}", "--metadata", json.dumps({"rows": rows})),
        *("--gen_kwargs", f"max_gen_toks={TOKENS}", "--output_path", str(tmp_path), "--log_samples"),
    ]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    (results,), (samples,) = tmp_path.glob("*/results_*.json"), tmp_path.glob("*/samples_*.jsonl")
    found = json.loads(results.read_text())
    found["samples"] = {f"llava_mod_{name}": [json.loads(line) for line in samples.read_text().splitlines()]}
    assert same(found, f"llava_mod_{name}", ours, name)
    told = read_harness_results([str(tmp_path)], [str(folder)])
    assert {each.metric: each.value for each in told} == {k: v for k, v in ours.figures[name].items() if v is not None}
    assert {(each.harness.split()[0], each.dataset, each.asked) for each in told} == {
        ("lm-eval", str(local / f"{name}.jsonl"), 6)
    }
