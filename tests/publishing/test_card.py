"""The card and the evaluation results: each number in its place, what is missing said to be, and what the Hub reads."""

import dataclasses
import math

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from helpers.publishing import FACTS, RESULTS
from llava_mod_hf import recipes
from llava_mod_hf.publishing.card import render_card, scores, write_eval_results


@pytest.fixture(scope="module")
def config(make_student):
    return make_student().config


def card(config, router_figure="r.png", **changes):
    facts = dataclasses.replace(FACTS, **changes)
    return render_card(facts, config, loss_figure="l.png", router_figure=router_figure)


def test_card_metadata(config):
    data = card(config).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-text-to-text", "mit")
    assert data.tags == ["llava-mod", "mixture-of-experts", "distillation"]
    assert data.teacher_model == ["someone/teacher"]
    assert data.base_model is None  # an embedded name is none of the Hub's, which would refuse the card
    assert data.datasets is None
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "exact_match": 0.931,
        "exact_match_yes_no": 0.902,
        "exact_match_color": 0.993,
        "exact_match_shape": 0.954,
        "hallucination_rate": 0.104,
        "miss_rate": 0.056,
        "balanced_accuracy": 0.92,
        "kl_to_teacher": 0.127,
    }


def test_local_folder_is_not_a_base_model(config, tmp_path, monkeypatch):
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert card(config, base_models={"student": "runs/teacher"}).data.base_model is None


def test_card_table_has_each_number_in_its_place(config):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card(config).text.splitlines() if "|" in line]
    start = next(i for i, row in enumerate(rows) if row[1:] == ["student", "teacher", "blind"])
    assert rows[start + 2 : start + 10] == [
        ["Exact match ↑", "0.931", "0.978", "0.333"],
        ["Exact match, yes/no ↑", "0.902", "–", "–"],
        ["Exact match, color ↑", "0.993", "0.999", "–"],
        ["Exact match, shape ↑", "0.954", "–", "–"],
        ["Hallucination rate ↓", "0.104", "–", "–"],
        ["Miss rate ↓", "0.056", "–", "–"],
        ["Balanced accuracy ↑", "0.920", "–", "–"],
        ["KL divergence to the teacher, nats ↓", "0.127", "–", "–"],
    ]
    assert ["Parameters", "312,345"] in rows and ["Parameters active for a token", "212,345"] in rows
    assert ["Experts per layer", "4, of which each token uses 2"] in rows


def test_card_invents_no_number(config):
    """Without optional values the card has neither their rows nor `None`."""
    text = card(config, results={"exact_match": 0.5}, teacher_results=None, blind_results=None).text
    assert "0.500" in text and "None" not in text and "Parameters" not in text
    assert "allucination rate" not in text and "blind" not in text


def test_card_text(config):
    text = card(config).text
    assert "**drawn shapes**" in text and "no photographs" in text
    assert "sparse mimic distillation" in text and "2408.15881" in text
    assert "(l.png)" in text and "(r.png)" in text and "num_experts: 4" in text
    assert "{{" not in text and "{%" not in text


def test_evaluation_data_are_not_called_training_data(config):
    text = card(config, datasets=["someone/questions"]).text
    assert "- someone/questions\n- easy-VQA, for evaluation only: https" in text
    assert card(config, datasets=["someone/questions"]).data.datasets == ["someone/questions"]
    assert "for evaluation only" not in card(config).text


def test_card_names_the_models_it_was_made_from(config):
    assert "- language model: `embedded:language-model`\n- teacher: `someone/teacher`\n" in card(config).text


def test_template_of_an_installed_package(config, tmp_path, monkeypatch):
    """A wheel has `model_cards/` inside the package."""
    (tmp_path / "llava_mod_hf" / "model_cards").mkdir(parents=True)
    (tmp_path / "llava_mod_hf" / "model_cards" / "student.md.j2").write_text("---\n{{ card_data }}\n---\n# Installed")
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "llava_mod_hf" / "recipes.py"))
    assert "# Installed" in card(config).text


def test_dense_card_says_so(make_student):
    text = card(make_student(moe_layers=()).config, router_figure=None).text
    assert "dense: no mixture of experts" in text and "Experts per layer" not in text and "r.png" not in text
    assert "None" not in text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_number_that_is_none_is_refused(config, tmp_path, value):
    with pytest.raises(ValueError, match="`miss_rate` is (nan|inf)"):
        card(config, teacher_results={"exact_match": 1.0, "miss_rate": value})
    with pytest.raises(ValueError, match="`miss_rate` is (nan|inf)"):
        write_eval_results(tmp_path, dataclasses.replace(FACTS, results={"exact_match": 1.0, "miss_rate": value}))


def test_results_without_exact_match_are_refused(config):
    with pytest.raises(ValueError, match="without `exact_match`"):
        card(config, results={"miss_rate": 0.1})


def test_eval_results_are_read_by_the_client(tmp_path):
    path = write_eval_results(tmp_path, dataclasses.replace(FACTS, results=RESULTS))
    assert path == tmp_path / ".eval_results" / "easy-vqa.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert {entry.dataset_id for entry in entries} == {"easy-VQA"}
    assert {entry.task_id: entry.value for entry in entries} == {
        "exact_match": 0.931,
        "exact_match_yes_no": 0.902,
        "exact_match_color": 0.993,
        "exact_match_shape": 0.954,
        "hallucination_rate": 0.104,
        "miss_rate": 0.056,
        "balanced_accuracy": 0.92,
    }


def test_benchmarks_measures_leave_the_card_as_it_is():
    measured = {**RESULTS, "measures": {"anls": {"anls": {"value": 0.5, "low": 0.4, "high": 0.6}}}}
    assert scores(measured) == scores(RESULTS)
