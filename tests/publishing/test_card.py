"""The card and the evaluation results: each number in its place, what is missing said to be, and what the Hub reads."""

import dataclasses
import math

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from helpers.publishing import FACTS, RESULTS
from llava_mod_hf import recipes
from llava_mod_hf.publishing.card import CardFacts, render_card, write_eval_results
from llava_mod_hf.publishing.card_checks import check_card


@pytest.fixture(scope="module")
def config(make_student):
    return make_student().config


def card(config, router_figure="r.png", **changes):
    facts = dataclasses.replace(FACTS, **changes)
    sizes = [("safetensors, F32", 1_250_000)]
    return render_card(facts, config, loss_figure="l.png", router_figure=router_figure, sizes=sizes)


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
    assert "allucination rate" not in text and "| blind" not in text


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


MEASURES = {
    "pope": {
        "f1": {"value": 0.8, "low": 0.75, "high": 0.84},
        "random/yes": {"value": 0.5, "low": 0.45, "high": 0.55},
    },
    "chair": {"chair_s": {"value": 0.2, "low": 0.15, "high": 0.25}},
}
MEASURED = {
    "num_questions": 1500,
    "max_new_tokens": 64,
    "dtype": "float32",
    "prompt_suffix": "Answer with yes or no.",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "commit": "abc",
}
ROUTERS = {
    "layers": {
        "0": {
            "max_load": 0.4,
            "load_entropy": 0.95,
            "entropy": 0.7,
            "dead_experts": 0.0,
            "overloaded_experts": 0.25,
            "distance": [0.1, 0.3],
            "by_modality": {"picture": {"max_load": 0.6, "load_entropy": 0.8, "entropy": 0.5, "dead_experts": 0.25}},
        },
        "2": {"max_load": 0.5, "load_entropy": 0.5, "entropy": 0.6, "dead_experts": 0.5, "overloaded_experts": 0.5},
    },
    "collapsed": [2],
}


def rows_of(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_intervals_stand_beside_their_figures(config):
    text = card(
        config,
        results={**RESULTS, "measures": MEASURES},
        blind_results={"exact_match": 0.3, "measures": {"pope": {"f1": {"value": 0.6, "low": None, "high": None}}}},
    ).text
    assert ["POPE: F1 ↑", "0.800 (0.750–0.840)", "–", "0.600"] in rows_of(text)
    assert ["POPE, random: share of yes", "0.500 (0.450–0.550)", "–", "–"] in rows_of(text)
    assert ["CHAIR: descriptions that name an absent thing ↓", "0.200 (0.150–0.250)", "–", "–"] in rows_of(text)
    assert "in brackets 95 % intervals" in text and "No intervals were measured" not in text
    assert "No intervals were measured" in card(config).text and "in brackets" not in card(config).text


def test_intervals_are_in_the_results_that_the_client_reads(tmp_path):
    path = write_eval_results(tmp_path, dataclasses.replace(FACTS, results={**RESULTS, "measures": MEASURES}))
    entries = {entry.task_id: entry for entry in parse_eval_result_entries(yaml.safe_load(path.read_text()))}
    assert entries["pope_f1"].value == 0.8 and "95 % interval: 0.7500 to 0.8400." in entries["pope_f1"].notes
    assert "interval" not in entries["exact_match"].notes


def test_the_card_says_how_it_was_measured(config):
    text = card(config, measured=MEASURED).text
    assert (
        "Measured on 1,500 questions of the test split of easy-VQA, with greedy answers of at most 64 tokens in "
        'float32; below each question stands "Answer with yes or no."; torch 2.13.0, transformers 5.23.0, at commit '
        "`abc`. Rates"
    ) in text
    assert "which versions is not recorded" in card(config).text and "not recorded" not in text


def test_the_card_has_the_routers_health(config):
    text = card(config, routers=ROUTERS).text
    assert ["0", "all", "0.400", "0.950", "0.700", "0.000", "0.250", "0.200"] in rows_of(text)
    assert ["0", "picture", "0.600", "0.800", "0.500", "0.250", "–", "–"] in rows_of(text)
    assert ["2", "all", "0.500", "0.500", "0.600", "0.500", "0.500", "–"] in rows_of(text)
    assert "**Collapsed: in layer 2 all tokens go to the same experts.**" in text
    assert "Collapsed" not in card(config, routers={**ROUTERS, "collapsed": []}).text


def test_the_card_has_sizes(config):
    assert "The size of its files is not recorded" in render_card(FACTS, config).text
    text = render_card(FACTS, config, sizes=[("safetensors, F32", 1_250_000), ("GGUF, `a.gguf`", 900)]).text
    assert ["safetensors, F32", "1.2 MB"] in rows_of(text) and ["GGUF, `a.gguf`", "900 bytes"] in rows_of(text)
    assert ["in memory with 16 bits a parameter, as computed", "624.7 kB"] in rows_of(text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"license": None}, "No licence was stated"),
        ({"results": None, "teacher_results": None, "blind_results": None}, "No evaluation came with this checkpoint"),
        ({"teacher_results": None}, "Its teacher was not measured"),
        ({"blind_results": None}, "A blind baseline, which answers without looking at the image, was not measured"),
        ({"measured": {}}, "With which prompt and which versions is not recorded"),
        ({"routers": {}}, "What the routers do with pictures, prompts and answers was not measured"),
        ({"teachers": []}, "No teacher is recorded"),
        ({"base_models": {}, "teachers": []}, "Which models it was made from is not recorded"),
        ({"datasets": []}, "What it was trained on is not recorded"),
        ({"recipe_text": None}, "Its recipe is not recorded"),
        ({"stage": None}, "How it was trained is not recorded"),
        ({"has_processor": False}, "No processor came with this checkpoint"),
    ],
)
def test_what_is_missing_is_said_to_be(config, changes, said):
    whole = {"measured": MEASURED, "routers": ROUTERS}
    whole_text = card(config, **whole, results={**RESULTS, "measures": MEASURES}).text
    text = card(config, **{**whole, **changes}).text
    assert said in text and said not in whole_text
    assert "not recorded" not in whole_text
    assert "not measured" not in whole_text.replace("– is not measured", "")


def test_every_card_is_one_that_the_hub_takes(config):
    check_card(str(card(config, measured=MEASURED, routers=ROUTERS)), "README.md")
    check_card(str(render_card(CardFacts("me/x"), config)), "README.md")
