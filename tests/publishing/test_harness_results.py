"""Results of lm-eval and lmms-eval in a card: of this model, each figure once, and what is not said left out."""

import dataclasses
import json

import pytest
import yaml

from helpers.publishing import FACTS
from llava_mod_hf.publishing.card import render_card
from llava_mod_hf.publishing.harness_results import read_harness_results
from llava_mod_hf.publishing.provenance import results_text

RESULTS = {
    "results": {
        "llava_mod_pope": {
            "alias": "llava_mod_pope", "sample_len": 12,
            "accuracy,none": 0.75, "accuracy_stderr,none": "N/A", "accuracy_stderr_clt,none": 0.1,
            "precision,none": None, "yes,none": 0.25, "yes_stderr,none": 0.125,
        },
        "mme": {"score,flexible-extract": 1300, "broken,none": float("nan")},
    },
    "configs": {
        "llava_mod_pope": {
            "dataset_kwargs": {"measure": "pope", "default_rows": {"dataset_name": "embedded:scenes"}},
            "metadata": {"version": 1, "pretrained": "m", "rows": {"dataset_name": "/data/mine/pope.jsonl"}},
        },
        "mme": {"dataset_path": "lmms-lab/MME"},
    },
    "higher_is_better": {"llava_mod_pope": {"accuracy": True, "yes": False}},
    "n-samples": {"llava_mod_pope": {"original": 3000, "effective": 12}, "mme": {"original": 5, "effective": 5}},
    "model_name": "me/tiny",
    "lm_eval_version": "0.4.13",
}  # fmt: skip


def write(folder, name="results_2026.json", **changes):
    folder.mkdir(parents=True, exist_ok=True)
    found = {key: value for key, value in (RESULTS | changes).items() if value != "left out"}
    (folder / name).write_text(json.dumps(found))
    return folder / name


def test_figures_are_read_from_the_files_of_a_folder(tmp_path):
    write(tmp_path / "out" / "me__tiny")
    (tmp_path / "out" / "me__tiny" / "samples_mme.jsonl").write_text("{}\n")
    accuracy, yes, score = read_harness_results([str(tmp_path / "out")], ["runs/x", "me/tiny"])
    assert dataclasses.astuple(accuracy) == (
        *("lm-eval 0.4.13", "llava_mod_pope", "accuracy", 0.75, None, True, "/data/mine/pope.jsonl", 12, 3000),
    )
    assert (yes.metric, yes.value, yes.stderr, yes.higher_is_better) == ("yes", 0.25, 0.125, False)
    assert (score.metric, score.value, score.dataset) == ("score (flexible-extract)", 1300.0, "lmms-lab/MME")
    assert score.higher_is_better is None


def test_a_task_without_rows_of_its_own_reads_its_default_ones(tmp_path):
    path = write(tmp_path, configs={"llava_mod_pope": {**RESULTS["configs"]["llava_mod_pope"], "metadata": None}})
    accuracy, _, score = read_harness_results([str(path)], ["me/tiny"])
    assert (accuracy.dataset, score.dataset) == ("embedded:scenes", None)


def test_an_unknown_version_is_not_told(tmp_path):
    path = write(tmp_path, "2026_results.json", lm_eval_version="left out", lmms_eval_version="unknown@unknown")
    assert read_harness_results([str(tmp_path)], ["me/tiny"])[0].harness == "lmms-eval"
    assert read_harness_results([str(path)], ["me/tiny"])[0].harness == "lmms-eval"


def test_a_model_is_known_by_its_folder(tmp_path, monkeypatch):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, model_name="runs/a")
    assert read_harness_results([str(path)], [str(tmp_path / "runs" / "a")])
    with pytest.raises(ValueError, match="is of the model `runs/a`, and not of `runs/b`: give results of this one"):
        read_harness_results([str(path)], ["runs/b", "me/tiny"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_eval_version": "left out"}, "names no version of lm-eval or lmms-eval"),
        ({"results": "left out"}, "lacks `results`, or it is no dict"),
        ({"model_name": None}, "lacks `model_name`, or it is no str"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_harness_results([str(write(tmp_path, **changes))], ["me/tiny"])


def test_missing_and_doubled_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match="and no results are there: give what `--output_path` named"):
        read_harness_results([str(tmp_path)], ["me/tiny"])
    files = [str(write(tmp_path, f"results_{number}.json")) for number in range(2)]
    with pytest.raises(ValueError, match="have `accuracy` of `llava_mod_pope` by lm-eval twice"):
        read_harness_results(files, ["me/tiny"])


def test_the_card_tells_them_in_public_names(tmp_path, make_student):
    figures = read_harness_results([str(write(tmp_path))], ["me/tiny"])
    facts = dataclasses.replace(FACTS, harness_figures=figures)
    card = render_card(facts, make_student().config)
    rows = [line for line in card.text.splitlines() if line.startswith("| lm-eval")]
    assert rows == [
        "| lm-eval 0.4.13 | llava_mod_pope | pope.jsonl | 12 of 3,000 | accuracy ↑ | 0.750 |",
        "| lm-eval 0.4.13 | llava_mod_pope | pope.jsonl | 12 of 3,000 | yes ↓ | 0.250 ± 0.125 |",
        "| lm-eval 0.4.13 | mme | lmms-lab/MME | 5 | score (flexible-extract) | 1300.000 |",
    ]
    (whole,) = [each for each in card.data.eval_results if each.source_name == "lm-eval 0.4.13"]  # not a part of POPE
    assert (whole.dataset_type, whole.metric_value, whole.task_name) == ("lmms-lab/MME", 1300.0, "mme")
    alone = dataclasses.replace(facts, results=None, teacher_results=None, blind_results=None)
    text = render_card(alone, make_student().config).text
    assert "Its own evaluation did not come" in text and "how often it is right is not known" not in text
    told = json.loads(results_text(facts))["harnesses"]
    assert [each["dataset"] for each in told] == ["pope.jsonl", "pope.jsonl", "lmms-lab/MME"]
    assert yaml.safe_load(str(card).split("---")[1])["model-index"]


def test_a_card_without_them_says_nothing(make_student):
    card = render_card(FACTS, make_student().config)
    assert "harness" not in card.text and "harnesses" not in json.loads(results_text(FACTS))
