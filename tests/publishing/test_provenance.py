"""What the folders of a run tell, and what of it is told in public."""

import json

import pytest

from llava_mod_hf.publishing.provenance import gather_facts, results_text, stage_runs
from llava_mod_hf.publishing.public_names import PublicNames, without_paths


def test_runs_that_name_each_other_end(tmp_path):
    for stage, student in (("adapt", "prefer"), ("prefer", "adapt")):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "run.json").write_text(
            json.dumps({"stage": stage, "recipe": {"student": str(tmp_path / student)}})
        )
    assert list(stage_runs(tmp_path / "prefer")) == ["adapt", "prefer"]


def test_nothing_is_known_of_a_folder_without_a_run(tmp_path):
    facts = gather_facts(tmp_path, "me/x")
    assert (facts.stage, facts.recipe_text, facts.results, facts.datasets) == (None, None, None, [])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("someone/model", "someone/model"),
        ("gpt2", "gpt2"),
        ("embedded:easy-vqa", "easy-VQA"),
        ("embedded:tiny-teacher", "embedded:tiny-teacher"),
        ("/home/me/models/big/", "big"),
        ("~/models/big", "big"),
        ("./big", "big"),
        ("../models/big", "big"),
        ("runs/removed", "removed"),
        ("runs/a/b/removed", "removed"),
        ("here/rows", "rows"),
        (r"C:\Users\me\big", "big"),
        ("C:/Users/me/big", "big"),
        ("file:///home/me/rows.jsonl", "rows.jsonl"),
        ("/home/me/My Data/rows.jsonl", "rows.jsonl"),
    ],
)
def test_what_is_told_of_a_name(tmp_path, name, told):
    (tmp_path / "here" / "rows").mkdir(parents=True)
    names = PublicNames.of_run(tmp_path / "runs" / "prefer", [{"output_dir": "runs/prefer"}])
    assert names.public(name) == told
    assert names.is_hub_id(name) == (name == "someone/model")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("see /home/me/notes.txt, then go", "see notes.txt, then go"),
        ("['/home/me/a.json', '/home/me/b.json']", "['a.json', 'b.json']"),
        ("in ~/data/rows", "in rows"),
        (r"C:\Users\me\rows", "rows"),
        ("https://host.org/a/b and and/or </s> 1/2/3", "https://host.org/a/b and and/or </s> 1/2/3"),
        ("answer /think or /no_think", "answer /think or /no_think"),
    ],
)
def test_paths_in_a_text(text, told):
    assert without_paths(text) == told


def test_how_it_was_measured_is_told_without_places_and_rows(tmp_path):
    setup = {
        "first_prompt": "<|user|>is my secret here?",
        "max_new_tokens": 64,
        "prompt_suffix": "as /home/me/notes.txt says",
        "dtype": None,
        "dataset_options": {"path": "/home/me/rows"},
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
    }
    results = {"student": {"exact_match": 0.5}, "num_questions": 4, "setup": setup, "routers": {"layers": {}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    facts = gather_facts(tmp_path, "me/x")
    expected = {"num_questions": 4, "max_new_tokens": 64, "prompt_suffix": "as notes.txt says"}
    assert facts.measured == {**expected, "versions": {"torch": "2.13.0"}, "commit": "abc"}
    assert facts.routers == {"layers": {}}
    assert json.loads(results_text(facts)).items() >= facts.measured.items()
