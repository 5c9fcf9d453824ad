"""What `llava-mod upcycle`, `evaluate` and `publish` do."""

import dataclasses
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from llava_mod_hf import embedded
from llava_mod_hf.conversion import convert_checkpoint
from llava_mod_hf.data import DataArguments, load_rows
from llava_mod_hf.evaluation import evaluate_blind, evaluate_model
from llava_mod_hf.hub import publish, push_checkpoint
from llava_mod_hf.merging import MERGES, export_stock, merge_experts
from llava_mod_hf.routing import expert_load
from llava_mod_hf.stages import (
    RUN_FILE,
    UpcycleArguments,
    check_output_dir,
    save_checkpoint,
    upcycle_student,
    write_json,
)
from llava_mod_hf.teacher import load_model_and_processor

RESULTS_FILE = "results.json"
QUESTION_COLUMNS = ("prompt", "completion", "question", "answer", "kind")
logger = logging.getLogger(__name__)


@dataclass
class UpcycleCommand:
    """
    Args:
        student (`str`): a dense LLaVA of this package or of transformers.
        output_dir (`str`): where the sparse student goes.
        seed (`int`, *optional*, defaults to 0): of the routers.
        trust_remote_code (`bool`, *optional*, defaults to `False`).
    """

    student: str = field(metadata={"help": "a dense LLaVA"})
    output_dir: str = field(metadata={"help": "where the sparse student goes"})
    seed: int = 0
    trust_remote_code: bool = False


@dataclass
class EvaluateCommand:
    """
    Args:
        model (`str`): the LLaVA to measure.
        teacher (`str`, *optional*): measured as well, and what `kl_to_teacher` compares with.
        output_file (`str`, *optional*): by default `results.json` in the model's folder, where `publish` looks.
        batch_size (`int`, *optional*, defaults to 128): questions answered at a time.
        seed (`int`, *optional*, defaults to 0): of the test questions' balancing.
        trust_remote_code (`bool`, *optional*, defaults to `False`).
    """

    model: str = field(metadata={"help": "the LLaVA to measure"})
    teacher: str | None = None
    output_file: str | None = None
    batch_size: int = 128
    seed: int = 0
    trust_remote_code: bool = False


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


@dataclass
class ConvertCommand:
    """
    Args:
        checkpoint (`str`): folder in the layout of LLaVA-MoD, MoE-LLaVA or LLaVA-1.5, or of a stock LLaVA.
        output_dir (`str`): where the student goes.
        vision_tower (`str`, *optional*): vision encoder, by default the one that the checkpoint's config names.
        tokenizer (`str`, *optional*): by default the checkpoint's.
        conversation (`str`, *optional*): prompt template, such as `qwen` or `v1`; by default the family's.
        chat_template_path (`str`, *optional*): Jinja template instead of that of a conversation.
        dtype (`str`, *optional*): of the weights; by default as they are stored.
    """

    checkpoint: str = field(metadata={"help": "folder of a checkpoint in another layout"})
    output_dir: str = field(metadata={"help": "where the student goes"})
    vision_tower: str | None = None
    tokenizer: str | None = None
    conversation: str | None = None
    chat_template_path: str | None = None
    dtype: str | None = None


def run_convert(args: ConvertCommand):
    """A checkpoint of another layout → a student of this package."""
    check_output_dir(args.output_dir)
    options = {name: value for name, value in vars(args).items() if name != "output_dir"}
    model, processor = convert_checkpoint(options.pop("checkpoint"), **options)
    save_checkpoint(model, processor, args.output_dir)


@dataclass
class ExportCommand:
    """
    Args:
        model (`str`): a sparse student.
        output_dir (`str`): where the stock model goes.
        form (`str`):
            `stock`: the same student as a mixture of experts of transformers. `uniform`, `load`: a dense model with the
            experts averaged, equally or by their share of the routers' choices.
        results (`str`, *optional*): with `load`, the `results.json` of `llava-mod evaluate`, which has the shares.
        trust_remote_code (`bool`, *optional*, defaults to `False`).
    """

    model: str = field(metadata={"help": "a sparse student"})
    output_dir: str = field(metadata={"help": "where the stock model goes"})
    form: str = field(metadata={"help": "stock, uniform or load"})
    results: str | None = None
    trust_remote_code: bool = False


def run_export(args: ExportCommand):
    """A student → a stock model that loads without its code."""
    check_output_dir(args.output_dir)
    if args.form not in ("stock", *MERGES):
        raise ValueError(f"`form` is {args.form!r}: give one of stock, {', '.join(MERGES)}.")
    if (args.results is not None) != (args.form == "load"):
        raise ValueError(f"`--results` is {args.results!r} with `--form {args.form}`: the form `load` alone needs it.")
    model, processor = load_model_and_processor(args.model, dtype="auto", trust_remote_code=args.trust_remote_code)
    if args.form == "stock":
        exported = export_stock(model)
    else:
        loads = json.loads(Path(args.results).read_text()).get("expert_load", {}) if args.results else None
        exported = merge_experts(model, weights=args.form, loads=loads)
    save_checkpoint(exported, processor, args.output_dir)


def run_upcycle(upcycle_args: UpcycleArguments, args: UpcycleCommand):
    """Dense student → sparse student with the same logits."""
    check_output_dir(args.output_dir)
    student, processor = load_model_and_processor(args.student, trust_remote_code=args.trust_remote_code)
    upcycle_args.moe_layers = upcycle_args.moe_layers or ["alternate"]
    save_checkpoint(upcycle_student(student, upcycle_args, seed=args.seed), processor, args.output_dir)


def run_evaluate(data_args: DataArguments, args: EvaluateCommand):
    """
    Measures a model, its teacher and the blind baseline on the same test questions.

    Returns:
        `dict`: `student`, `teacher`, `blind`, `dataset`, `num_questions`; also written to the results file.
    """
    output_file = Path(args.output_file or Path(args.model) / RESULTS_FILE)
    if not output_file.parent.is_dir():
        raise ValueError(f"`{output_file.parent}` is no folder to write the results to: give `output_file`.")
    rows = load_rows(data_args, columns=QUESTION_COLUMNS, split=data_args.dataset_test_split, seed=args.seed)
    all_rows = dataclasses.replace(data_args, max_samples=None)
    training = load_rows(all_rows, columns=QUESTION_COLUMNS, seed=args.seed).remove_columns("images")
    model, processor = load_model_and_processor(args.model, trust_remote_code=args.trust_remote_code)
    teacher = teacher_results = None
    if args.teacher:
        teacher, teacher_processor = load_model_and_processor(args.teacher, trust_remote_code=args.trust_remote_code)
        teacher_results = evaluate_model(teacher, teacher_processor, rows, batch_size=args.batch_size)
    results = {
        "student": evaluate_model(model, processor, rows, teacher=teacher, batch_size=args.batch_size),
        "teacher": teacher_results,
        "blind": evaluate_blind(training, rows),
        "dataset": data_args.dataset_name,
        "expert_load": expert_load(model, processor, rows.select(range(min(len(rows), 512)))),
        "num_questions": len(rows),
    }
    write_json(output_file, results)
    logger.warning("Exact match %.3f; everything is in `%s`.", results["student"]["exact_match"], output_file)
    return results


def dataset_title(name):
    """What a card calls a data set."""
    return "easy-VQA" if name == embedded.DATASET else name


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
