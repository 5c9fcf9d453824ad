"""What the stages of training left in their folders, `run.json` and `results.json`, and what it tells a card."""

import dataclasses
import itertools
import json
from pathlib import Path

import yaml

from llava_mod_hf.publishing.card import SETUP, CardFacts
from llava_mod_hf.publishing.public_names import PublicNames, without_paths

RUN_FILE = "run.json"

RESULTS_FILE = "results.json"

COMPRESSION_FILE = "compression.json"  # what `llava-mod compress` did, step by step

RECIPE_FILE = "recipe.yaml"

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")

# role in a card → the option that names it
PARTS = {"student": "student", "vision encoder": "vision_tower", "language model": "language_model"}


def read_fields(path, **fields):
    """
    A JSON file of ours that holds some fields.

    Args:
        path (`Path`): the file.
        fields: name → type of each that is needed.

    Raises:
        ValueError: if it is no JSON, no mapping, or lacks a field.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"`{path}` is no JSON ({error}): run again what wrote it.") from error
    if not isinstance(values, dict):
        raise ValueError(f"`{path}` holds a {type(values).__name__}, not the fields of a {path.name}.")
    for name, kind in fields.items():
        if not isinstance(values.get(name), kind):
            raise ValueError(f"`{path}` lacks `{name}`, or it is no {kind.__name__}: run again what wrote it.")
    return values


def stage_runs(checkpoint, **fields):
    """
    `{stage: run}` of a checkpoint and of those that it was trained from, the first stage first.

    Args:
        checkpoint (`str` or `Path`): the last stage's output folder.
        fields: what is needed of each run, beside its stage and recipe, as for [`read_fields`].

    Raises:
        ValueError: if a `run.json` is damaged.
    """
    runs, seen, folder = {}, set(), Path(checkpoint)
    while folder.resolve() not in seen and (folder / RUN_FILE).is_file():
        seen.add(folder.resolve())
        run = read_fields(folder / RUN_FILE, stage=str, recipe=dict, **fields)
        runs = {run["stage"]: run, **runs}
        folder = Path(run["recipe"].get("student") or folder)
    return runs


def compression_steps(checkpoint):
    """
    What `llava-mod compress` did to a checkpoint, `list[dict]`, one for each time; none of others.

    Raises:
        ValueError: if its note is damaged.
    """
    path = Path(checkpoint, COMPRESSION_FILE)
    return read_fields(path, steps=list)["steps"] if path.is_file() else []


def gather_facts(checkpoint, repo_id, *, license=None, harness_figures=()):
    """
    What is known of a checkpoint: `run.json` of its stages, `results.json` of `llava-mod evaluate`, `compression.json`.

    Args:
        checkpoint (`str` or `Path`): A folder; without these files nothing is known.
        repo_id (`str`): Where it will be found.
        license (`str`, *optional*): Of the weights.
        harness_figures (`list`, *optional*): As of [`CardFacts`].

    Returns:
        [`CardFacts`].

    Raises:
        ValueError: if one of the files is damaged.
    """
    checkpoint = Path(checkpoint)
    runs = stage_runs(checkpoint)
    options = [run["recipe"] for run in runs.values()]
    names = PublicNames.of_run(checkpoint, options)
    recipes = [{"stage": stage, **names.recipe(run["recipe"])} for stage, run in runs.items()]
    for previous, recipe in itertools.pairwise(recipes):
        recipe["student"] = previous["stage"]
    parts = {
        role: recipe[key]
        for number, recipe in enumerate(options)
        for role, key in PARTS.items()
        if recipe.get(key) and (key != "student" or number == 0)  # later, it is what the stage before made
    }
    results = {}
    if (checkpoint / RESULTS_FILE).is_file():
        results = read_fields(checkpoint / RESULTS_FILE, student=dict)
    facts = CardFacts(
        repo_id=repo_id,
        stage=list(runs)[-1] if runs else None,
        license=license,
        base_models=parts,
        teachers=_each(options, "teacher"),
        datasets=_datasets(options),
        eval_dataset=results.get("dataset"),
        results=results.get("student"),
        teacher_results=results.get("teacher"),
        blind_results=results.get("blind"),
        harness_figures=list(harness_figures),
        weights=weights_of(results),
        measured=_measured(results),
        routers=results.get("routers") or {},
        recipe_text=yaml.safe_dump_all(recipes, sort_keys=False) if recipes else None,
        compression=compression_steps(checkpoint),
        has_processor=any((checkpoint / name).is_file() for name in PROCESSOR_FILES),
        names=names,
    )
    facts.columns()  # refuses what is no score, before a model is loaded
    return facts


def _measured(results):
    """
    How a student was measured, as far as it is recorded, without names of this machine and words of rows: `evaluate`
    tells it in `setup`, and a published `results.json` beside the figures.
    """
    setup = results.get("setup") if isinstance(results.get("setup"), dict) else {}
    given = {**results, **setup}
    found = {name: given[name] for name, kind in SETUP.items() if isinstance(given.get(name), kind)}
    return {name: without_paths(value) if isinstance(value, str) else value for name, value in found.items()}


def _each(recipes, option):
    return list(dict.fromkeys(recipe[option] for recipe in recipes if recipe.get(option)))


def _datasets(recipes):
    """The data sets of all stages, those of mixtures too."""
    return list(
        dict.fromkeys(
            name
            for recipe in recipes
            for name in (recipe.get("dataset_name"), *(entry["path"] for entry in recipe.get("datasets") or ()))
            if name
        )
    )


def results_text(facts):
    """The `results.json` of a repository."""
    measured = {"student": facts.results, "teacher": facts.teacher_results, "blind": facts.blind_results}
    public = facts.names.public
    if facts.harness_figures:
        told = map(dataclasses.asdict, facts.harness_figures)
        measured["harnesses"] = [{**figure, "dataset": public(figure["dataset"] or "") or None} for figure in told]
    dataset = public(facts.eval_dataset) if facts.eval_dataset else None
    return json.dumps({**measured, "dataset": dataset, **facts.measured, "weights": facts.weights}, indent=2) + "\n"


def has_results(folder):
    """Whether a folder has the `results.json` of `evaluate`, which names local files and words of rows."""
    try:
        results = json.loads((Path(folder) / RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and isinstance(results.get("student"), dict)


def weights_of(results):
    """Which weights results are of, as `evaluate` and a published `results.json` have it, or `None`."""
    setup = results.get("setup")
    return (setup.get("weights") if isinstance(setup, dict) else None) or results.get("weights")
