"""`llava-mod publish`: write a whole Hub repository, and push it."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from llava_mod_hf.commands.evaluate import RESULTS_FILE, logger
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.publishing.push import push_checkpoint
from llava_mod_hf.publishing.repository import publish
from llava_mod_hf.training.run_folder import RUN_FILE


@dataclass
class PublishCommand:
    """
    Args:
        checkpoint (`str`): output folder of a stage, with the `results.json` of `llava-mod evaluate`.
        output_dir (`str`): where the repository is built.
        push_to (`str`, *optional*): Hub repository that it is pushed to, in one commit.
        private (`bool`, *optional*, defaults to `False`): create that repository private.
        revision (`str`, *optional*): branch to push to.
        license (`str`, *optional*, defaults to `"apache-2.0"`): of the weights.
    """

    checkpoint: str = field(metadata={"help": "output folder of a stage"})
    output_dir: str = field(metadata={"help": "where the repository is built"})
    push_to: str | None = None
    private: bool = False
    revision: str | None = None
    license: str = "apache-2.0"


def dataset_title(name):
    """What a card calls a data set."""
    return "easy-VQA" if name == easy_vqa.DATASET else name


def stage_runs(checkpoint):
    """`{stage: run}` of a checkpoint and of those that it was trained from, the first stage first."""
    runs, seen, folder = {}, set(), Path(checkpoint)
    while folder not in seen and (folder / RUN_FILE).is_file():
        seen.add(folder)
        run = json.loads((folder / RUN_FILE).read_text())
        runs = {run["stage"]: run, **runs}
        folder = Path(run["recipe"].get("student") or folder)
    return runs


def _without_folders(recipe):
    """What a card may tell: not where things lie on this machine."""
    return {
        name: Path(value).name if isinstance(value, str) and os.sep in value and Path(value).exists() else value
        for name, value in recipe.items()
        if name != "output_dir"
    }


def run_publish(args: PublishCommand):
    """Builds the Hub repository of a trained student, and pushes it if a name is given."""
    checkpoint = Path(args.checkpoint)
    runs = stage_runs(checkpoint)
    if not runs:
        raise ValueError(f"`{checkpoint}` has no `{RUN_FILE}`: give the output folder of a finished stage.")
    if not (checkpoint / RESULTS_FILE).is_file():
        raise ValueError(f"`{checkpoint}` has no `{RESULTS_FILE}`: run `llava-mod evaluate --model …` on it.")
    results = json.loads((checkpoint / RESULTS_FILE).read_text())
    *_, stage = runs
    recipes = {name: _without_folders(run["recipe"]) for name, run in runs.items()}
    for previous, name in zip(runs, list(runs)[1:], strict=False):
        recipes[name]["student"] = previous
    parts = {"vision encoder": "vision_tower", "language model": "language_model", "teacher": "teacher"}
    base_models = {role: recipe[key] for recipe in recipes.values() for role, key in parts.items() if recipe.get(key)}
    folder = publish(
        checkpoint,
        args.output_dir,
        repo_id=args.push_to or Path(args.output_dir).name,
        stage=stage,
        results=results["student"],
        teacher=results["teacher"],
        blind=results["blind"],
        recipe_text=yaml.safe_dump_all(
            [{"stage": name, **recipe} for name, recipe in recipes.items()], sort_keys=False
        ),
        history={name: run["log_history"] for name, run in runs.items()},
        loads={int(layer): shares for layer, shares in results["expert_load"].items()},
        base_models=base_models,
        datasets=list(dict.fromkeys(dataset_title(recipe["dataset_name"]) for recipe in recipes.values())),
        eval_dataset=dataset_title(results["dataset"]),
        license=args.license,
    )
    if args.push_to:
        commit = push_checkpoint(folder, args.push_to, private=args.private, revision=args.revision)
        logger.warning("Pushed `%s` to %s.", folder, commit.commit_url)
    return folder
