"""`llava-mod quickstart`: from a teacher to a published mixture-of-experts student, on embedded data and weights."""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers.utils import logging as hf_logging

from llava_mod_hf import recipes
from llava_mod_hf.commands import adapt, mimic, prefer
from llava_mod_hf.commands.arguments import DistillArguments, StudentArguments, UpcycleArguments
from llava_mod_hf.commands.publish import PublishCommand
from llava_mod_hf.commands.publish import run as run_publish
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.evaluation.answers import evaluate_blind, evaluate_model, response_batches
from llava_mod_hf.evaluation.expert_load import expert_load
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.publishing import fresh_process
from llava_mod_hf.publishing.provenance import RESULTS_FILE
from llava_mod_hf.students.build import build_student
from llava_mod_hf.students.parameter_counts import student_parameters
from llava_mod_hf.students.upcycling import upcycle
from llava_mod_hf.training import run_folder
from llava_mod_hf.training.adapt_config import AdaptConfig
from llava_mod_hf.training.mimic_config import MimicConfig
from llava_mod_hf.training.preference_config import PreferenceConfig
from llava_mod_hf.training.run_folder import write_json

OPTIONS = ("commands.quickstart:QuickstartArguments",)

TEACHER = "embedded:tiny-teacher"

console = Console()


@dataclass
class QuickstartArguments:
    """
    Args:
        output_dir (`str`):
            New or empty folder, or that of an interrupted run, which is taken up; gets a checkpoint per stage, `hub/`,
            and `summary.json`, whose `seconds` are those of the last start.
        seed (`int`, *optional*, defaults to 0): of every stage.
        max_minutes (`float`, *optional*, defaults to 10.0):
            Time for the whole run. A slow machine takes fewer steps, in proportion, and says so; if that would be less
            than a quarter of the recipes', nothing is run.
        num_questions (`int`, *optional*, defaults to 1500): balanced test questions that each stage is judged on.
    """

    output_dir: str = field(metadata={"help": "new or empty folder for everything that the run writes"})
    seed: int = 0
    max_minutes: float = 10.0
    num_questions: int = 1500


@dataclass
class Stage:
    """One line of the plan: what runs, by which recipe, from whose checkpoint."""

    run: Callable
    groups: tuple
    recipe: str
    student: str | None = None
    overrides: tuple = ()
    step_cost: float = 1.0  # time of a step, of a dense-to-sparse step's; from `summary.json` of runs on two cores


MIMIC = (mimic.run, (DataArguments, DistillArguments, UpcycleArguments, MimicConfig))

NO_TEACHER = ("--kl_weight", "0", "--lm_weight", "1")

STAGES = {
    "adapt": Stage(adapt.run, (DataArguments, StudentArguments, AdaptConfig), "1_adapt", step_cost=0.8),
    "mimic_dense": Stage(*MIMIC, "2_mimic_dense", "adapt", step_cost=0.8),
    "mimic_sparse": Stage(*MIMIC, "3_mimic_sparse", "mimic_dense"),
    "prefer": Stage(
        prefer.run, (DataArguments, DistillArguments, PreferenceConfig), "4_prefer", "mimic_sparse", step_cost=1.0
    ),
    # the comparison: the same student, rows and steps, without a teacher
    "sft_dense": Stage(*MIMIC, "2_mimic_dense", "adapt", NO_TEACHER, step_cost=0.5),
    "sft": Stage(*MIMIC, "3_mimic_sparse", "sft_dense", NO_TEACHER, step_cost=0.7),
}

REPORTED = ("adapt", "mimic_dense", "mimic_sparse", "prefer", "sft")

EVALUATION_COST = 20  # of one model, in dense-to-sparse steps

PUBLISHING_COST = 60  # start of the fresh process included

CALIBRATION_STEPS = 16


def run(args):
    """
    Runs every stage on embedded data, judges each on test questions, publishes the last to a folder and loads it anew.

    Returns:
        `dict`: what `summary.json` holds.

    Raises:
        ValueError: if the folder holds something else, the time is too short, or a check fails.
    """
    start = time.perf_counter()
    output_dir = Path(args.output_dir)
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    datasets.disable_progress_bars()
    hf_logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # about options that TRL's own defaults set
    steps, resumed = start_or_resume(output_dir, args)

    rows = easy_vqa.load("questions", "test", args.seed)
    rows = rows.select(range(min(args.num_questions, len(rows))))
    teacher, teacher_processor = load_model_and_processor(TEACHER)
    summary = {
        "seed": args.seed,
        "num_questions": len(rows),
        "resumed": resumed,
        "teacher": evaluate_model(teacher, teacher_processor, rows) | language_parameters(teacher),
        "blind": evaluate_blind(easy_vqa.balanced(easy_vqa.questions("train"), args.seed), rows),
        "stages": {},
    }
    runs = {}
    for name in STAGES:
        console.rule(f"[bold]{name}[/]: {steps[name]} steps")
        finished = output_dir / name / run_folder.RUN_FILE
        if finished.is_file():
            runs[name] = json.loads(finished.read_text())
        else:
            runs[name] = run_stage(name, output_dir, args.seed, steps[name])
        if name == "mimic_dense":
            summary["upcycling"] = check_upcycling(output_dir / name, rows)
        if name in REPORTED:
            summary["stages"][name] = judge(output_dir / name, runs[name], rows, teacher)
    sft, sft_dense = summary["stages"]["sft"], runs["sft_dense"]
    sft["steps"] += sft_dense["steps"]
    sft["seconds"] += sft_dense["seconds"]
    sft["first_loss"] = sft_dense["first_loss"]

    console.rule("[bold]publish[/]")
    summary["published"] = publish_student(output_dir, summary, rows)
    summary["seconds"] = time.perf_counter() - start
    write_json(output_dir / "summary.json", summary)
    show(summary, output_dir)
    return summary


def start_or_resume(output_dir, args):
    """
    The steps of each stage, and whether an interrupted run is taken up: its finished stages are not run again.

    Raises:
        ValueError: if the folder holds something else than an interrupted run of the same seed.
    """
    plan_file = output_dir / "plan.json"
    if plan_file.is_file() and not (output_dir / "summary.json").exists():
        plan = json.loads(plan_file.read_text())
        if plan["seed"] == args.seed:
            return plan["steps"], True
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(
            f"`{output_dir}` is not empty, and holds no interrupted run of seed {args.seed}: give a new folder as "
            "`--output-dir`."
        )
    steps = plan_steps(args)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(plan_file, {"seed": args.seed, "steps": steps})
    return steps, False


def parse_stage(name, output_dir, seed, *more):
    """Argument groups of a stage: its recipe, with this run's folders and seed."""
    stage = STAGES[name]
    argv = ["--config", str(recipes.packaged("recipes", f"tiny/{stage.recipe}.yaml")), *stage.overrides]
    argv += ["--output_dir", str(output_dir / name), "--seed", str(seed), "--disable_tqdm", "false"]
    if stage.student:
        argv += ["--student", str(output_dir / stage.student)]
    return recipes.parse(stage.groups, [*argv, *more])


def run_stage(name, output_dir, seed, max_steps):
    return STAGES[name].run(*parse_stage(name, output_dir, seed, "--max_steps", str(max_steps)))


def plan_steps(args):
    """
    Steps of each stage: the recipes', or fewer, in proportion, if this machine is too slow for them.

    Raises:
        ValueError: if the time would do for less than a quarter of them.
    """
    recipe_steps = {name: parse_stage(name, Path(args.output_dir), args.seed)[-1].max_steps for name in STAGES}
    training_cost = sum(count * STAGES[name].step_cost for name, count in recipe_steps.items())
    fixed_cost = EVALUATION_COST * (len(REPORTED) + 1) + PUBLISHING_COST + CALIBRATION_STEPS
    seconds = seconds_per_step(args.seed)
    share = min(1.0, (args.max_minutes * 60 / seconds - fixed_cost) / training_cost)
    if share < 0.25:
        needed = seconds * (fixed_cost + 0.25 * training_cost) / 60
        raise ValueError(
            f"`--max-minutes` is {args.max_minutes:g}, and a quarter of the recipes' steps would take about "
            f"{needed:.1f} on this machine: with fewer the student learns nothing. Give more time."
        )
    if share < 1:
        console.print(f"Taking {share:.0%} of the recipes' steps, to end in {args.max_minutes:g} minutes.")
    return {name: max(1, round(count * share)) for name, count in recipe_steps.items()}


def seconds_per_step(seed):
    """Time of a dense-to-sparse step on this machine, from a few of them."""
    with tempfile.TemporaryDirectory() as folder:
        model, processor = build_student(TEACHER, "embedded:tiny-student-lm", seed=seed)
        run_folder.save_checkpoint(model, processor, Path(folder, "mimic_dense"))
        console.rule("[bold]how fast is this machine?[/]")
        return run_stage("mimic_sparse", Path(folder), seed, CALIBRATION_STEPS)["seconds_per_step"]


@torch.no_grad()
def check_upcycling(checkpoint, rows):
    """
    Compares the logits of the dense student with those of its upcycled copy, in float32.

    Raises:
        ValueError: if they differ by more than 1e-5 of the largest logit (or of 1).
    """
    dense, processor = load_model_and_processor(str(checkpoint))
    (inputs,) = response_batches(processor, rows.select(range(8)), batch_size=8, description="Upcycling check")
    inputs.pop("labels")
    logits = dense(**inputs).logits
    difference = (upcycle(dense)(**inputs).logits - logits).abs().max().item()
    largest = logits.abs().max().item()
    if difference > 1e-5 * max(1.0, largest):
        raise ValueError(f"Upcycling changed a logit by {difference:.2e}, with a largest logit of {largest:.2e}.")
    return {"max_logit_difference": difference, "largest_logit": largest}


def judge(checkpoint, run, rows, teacher):
    """What `summary.json` says of a stage."""
    model, processor = load_model_and_processor(str(checkpoint))
    return {
        **evaluate_model(model, processor, rows, teacher=teacher),
        **language_parameters(model),
        **{name: run[name] for name in ("seconds", "steps", "first_loss", "last_loss")},
    }


def language_parameters(model):
    """Parameters of language model and adaptor: teacher and student share the vision encoder."""
    total, active = student_parameters(model)
    return {"language_params_total": total, "language_params_active": active}


def publish_student(output_dir, summary, rows):
    """Builds the repository of the last stage, and has a fresh process without this package load it and answer."""
    checkpoint = output_dir / "prefer"
    model, processor = load_model_and_processor(str(checkpoint))
    loads = expert_load(model, processor, rows.select(range(min(256, len(rows)))))
    results = {"student": summary["stages"]["prefer"], "dataset": easy_vqa.DATASET, "expert_load": loads}
    write_json(checkpoint / RESULTS_FILE, results | {name: summary[name] for name in ("teacher", "blind")})
    folder = run_publish(PublishCommand(str(checkpoint), str(output_dir / "hub" / "tiny-llava-mod")))

    paths = easy_vqa.image_paths("test")
    asked = {row["kind"]: row for row in easy_vqa.balanced(easy_vqa.questions("test"), summary["seed"])}
    questions = [{**row, "image": paths[row["image_id"]]} for row in asked.values()]
    answers, difference = load_elsewhere(folder, questions)
    for row, answer in zip(questions, answers, strict=True):
        row["given"] = answer
        console.print(f"  {row['question']}  [bold]{answer}[/]  (right: {row['answer']})")
    return {"folder": str(folder), "expert_load": loads, "max_logit_difference": difference, "questions": questions}


def load_elsewhere(folder, questions):
    """
    Loads a published folder in a fresh process, where this package cannot be imported.

    Returns:
        `tuple[list[str], float]`: the answers there, and how far its logits are from those computed here.

    Raises:
        ValueError: if that process fails, or its logits differ.
    """
    with tempfile.TemporaryDirectory() as temporary:
        questions_file, output_file = Path(temporary, "questions.json"), Path(temporary, "logits.safetensors")
        write_json(questions_file, questions)
        process = subprocess.run(
            [sys.executable, "-P", fresh_process.__file__, str(folder), str(questions_file), str(output_file)],
            env={**os.environ, "HF_MODULES_CACHE": temporary, "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
        )
        if process.returncode:
            raise ValueError(f"A fresh process could not load `{folder}`: {process.stderr.strip()[-2000:]}")
        model, processor = load_model_and_processor(str(folder))
        inputs = processor.apply_chat_template(
            fresh_process.conversation(questions[0]),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            logits = model(**inputs).logits
        difference = (load_file(output_file)["logits"] - logits).abs().max().item()
    if difference > 1e-5 * max(1.0, logits.abs().max().item()):
        raise ValueError(f"The published model's logits differ by {difference:.2e} in a fresh process.")
    return json.loads(process.stdout)["answers"], difference


def show(summary, output_dir):
    """The table at the end."""
    kinds = sorted(summary["blind"]["exact_match_by_kind"])
    title = f"{summary['num_questions']} test questions, balanced by answer; seed {summary['seed']}"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))  # fits 80 columns
    table.add_column("", no_wrap=True)
    for header in ["all", *kinds, "hall.", "miss", "bal.", "KL", "active", "steps", "s"]:
        table.add_column(header, justify="right", no_wrap=True)
    models = {"blind": summary["blind"], "teacher": summary["teacher"], **summary["stages"]}
    for name, result in models.items():
        scores = [result["exact_match"], *(result["exact_match_by_kind"][kind] for kind in kinds)]
        scores += [result[key] for key in ("hallucination_rate", "miss_rate", "balanced_accuracy")]
        cells = [f"{score:.3f}" for score in scores]
        divergence, active = result.get("kl_to_teacher"), result.get("language_params_active")
        cells.append("" if divergence is None else f"{divergence:.3f}")
        cells.append("" if active is None else f"{active / 1e3:.0f}k")
        cells.append(str(result.get("steps", "")))
        cells.append(f"{result['seconds']:.0f}" if "seconds" in result else "")
        table.add_row(name, *cells)
    console.print(table)
    console.print(
        "all, "
        + ", ".join(kinds)
        + ": exact match. hall.: absent things claimed. miss: present things not seen. bal.: balanced accuracy. "
        "KL: to the teacher, nats per token. active: parameters of language model and adaptor that a token uses."
    )
    console.print(
        f"{summary['seconds'] / 60:.1f} minutes. Everything is in [bold]{output_dir}[/]: a checkpoint per stage, "
        f"summary.json, and the published student in {summary['published']['folder']}."
    )
