"""`llava-mod quickstart`: from a teacher to a published mixture-of-experts student, on embedded data and weights."""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file
from transformers.utils import logging as hf_logging

from llava_mod_hf.commands import quickstart_report as report
from llava_mod_hf.commands.publish import PublishCommand
from llava_mod_hf.commands.publish import run as run_publish
from llava_mod_hf.commands.quickstart_plan import REPORTED, WORLDS, console, plan_steps
from llava_mod_hf.evaluation.answers import (
    blind_answers,
    evaluate_model,
    generate_answers,
    response_batches,
    score_answers,
)
from llava_mod_hf.evaluation.router_use import loads_of, router_use
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.publishing import fresh_process
from llava_mod_hf.publishing.provenance import RESULTS_FILE
from llava_mod_hf.students.parameter_counts import student_parameters
from llava_mod_hf.students.upcycling import upcycle
from llava_mod_hf.training import output_folder
from llava_mod_hf.training.output_folder import write_json

OPTIONS = ("commands.quickstart:QuickstartArguments",)


@dataclass
class QuickstartArguments:
    """
    Args:
        output_dir (`str`):
            New or empty folder, or that of an interrupted run, which is taken up; gets a checkpoint per stage, `hub/`,
            and `summary.json`, whose `seconds` are those of the last start; of the scenes `summary.html` and
            `summary.png` too.
        world (`str`, *optional*, defaults to `"scenes"`):
            `"scenes"`: a skewed world with wrong answers, in which one sees what distillation is for; `"easy-vqa"`: a
            published set of drawn shapes, which everybody learns.
        seed (`int`, *optional*, defaults to 0): of every stage.
        max_minutes (`float`, *optional*):
            Time for the whole run, by default 5 for the scenes and 10 for easy-VQA. A slow machine takes fewer steps,
            in proportion, and says so; if that would be less than a quarter of the recipes', nothing is run.
        num_questions (`int`, *optional*, defaults to 1500): balanced test questions that each stage is judged on.
    """

    output_dir: str = field(metadata={"help": "new or empty folder for everything that the run writes"})
    world: str = field(default="scenes", metadata={"choices": list(WORLDS)})
    seed: int = 0
    max_minutes: float | None = None
    num_questions: int = 1500

    def __post_init__(self):
        if self.world not in WORLDS:
            raise ValueError(f"`world` is `{self.world}`: give one of {', '.join(WORLDS)}.")
        if self.num_questions < 1:
            raise ValueError(f"`num_questions` is {self.num_questions}: give at least 1.")


def run(args):
    """
    Runs every stage on embedded data, judges each on test questions, publishes the last to a folder and loads it anew.

    Returns:
        `dict`: what `summary.json` holds.

    Raises:
        ValueError: if the folder holds something else, the time is too short, or a check fails.
    """
    start = time.perf_counter()
    output_dir, world = Path(args.output_dir), WORLDS[args.world]
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    datasets.disable_progress_bars()
    hf_logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # about options that TRL's own defaults set
    steps, resumed = start_or_resume(output_dir, args)

    rows = world.test_rows(args.seed, args.num_questions)
    teacher, teacher_processor = load_model_and_processor(world.teacher)
    given = {"blind": blind_answers(world.blind_rows(world, args.seed), rows)}
    summary = {
        "world": args.world,
        "seed": args.seed,
        "num_questions": len(rows),
        "training_rows": world.parse("mimic_sparse", output_dir, args.seed)[0].dataset_options,
        "resumed": resumed,
        "teacher": judge("teacher", teacher, teacher_processor, rows, given),
        "blind": score_answers(given["blind"], rows),
        "stages": {},
    }
    runs = {}
    for name, stage in world.stages.items():
        console.rule(f"[bold]{name}[/]: {steps[name]} {'prompts' if stage.by_rows else 'steps'}")
        finished = output_dir / name / output_folder.RUN_FILE
        if finished.is_file():
            runs[name] = json.loads(finished.read_text())
        else:
            runs[name] = world.run(name, output_dir, args.seed, steps[name])
        if name == "mimic_dense":
            summary["upcycling"] = check_upcycling(output_dir / name, rows)
        if stage.by_rows:
            summary[name] = {key: runs[name][key] for key in ("prompts", "rows", "seconds")}
        if name in REPORTED:
            student, processor = load_model_and_processor(str(output_dir / name))
            judged = judge(name, student, processor, rows, given, teacher=teacher)
            told = {key: runs[name][key] for key in ("seconds", "steps", "first_loss", "last_loss")}
            summary["stages"][name] = judged | told
    sft, sft_dense = summary["stages"]["sft"], runs["sft_dense"]
    sft["steps"] += sft_dense["steps"]
    sft["seconds"] += sft_dense["seconds"]
    sft["first_loss"] = sft_dense["first_loss"]
    if args.world == "scenes":
        report.add_intervals(summary, rows, given)

    console.rule("[bold]publish[/]")
    summary["published"] = publish_student(output_dir, world, summary, rows)
    summary["seconds"] = time.perf_counter() - start
    if args.world == "scenes":
        report.write(summary, rows, given, output_dir)
    write_json(output_dir / "summary.json", summary)
    report.show(summary, output_dir)
    return summary


def start_or_resume(output_dir, args):
    """
    The steps of each stage, and whether an interrupted run is taken up: its finished stages are not run again.

    Raises:
        ValueError: if the folder holds something else than an interrupted run of the same world and seed.
    """
    plan_file, made_of = output_dir / "plan.json", {"world": args.world, "seed": args.seed}
    if plan_file.is_file() and not (output_dir / "summary.json").exists():
        plan = json.loads(plan_file.read_text())
        if made_of.items() <= plan.items():
            return plan["steps"], True
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(
            f"`{output_dir}` is not empty, and holds no interrupted run of the world `{args.world}` and of seed "
            f"{args.seed}: give a new folder as `--output-dir`."
        )
    world = WORLDS[args.world]
    minutes = world.minutes if args.max_minutes is None else args.max_minutes
    steps = plan_steps(world, output_dir, args.seed, minutes)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(plan_file, {**made_of, "steps": steps})
    return steps, False


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


def judge(name, model, processor, rows, given, *, teacher=None):
    """What `summary.json` says of a model; its answers go to `given`."""
    given[name] = generate_answers(model, processor, rows)
    measured = evaluate_model(model, processor, rows, teacher=teacher, answers=given[name])
    # of language model and adaptor: teacher and student share the vision encoder
    total, active = student_parameters(model)
    return measured | {"language_params_total": total, "language_params_active": active}


def publish_student(output_dir, world, summary, rows):
    """Builds the repository of the last stage, and has a fresh process without this package load it and answer."""
    checkpoint = output_dir / "prefer"
    model, processor = load_model_and_processor(str(checkpoint))
    asked = rows.select(range(min(256, len(rows))))
    used = router_use(model, processor, asked, tasks=asked["kind"])
    loads = loads_of(used)
    results = {"student": summary["stages"]["prefer"], "dataset": world.dataset, "expert_load": loads, "routers": used}
    write_json(checkpoint / RESULTS_FILE, results | {name: summary[name] for name in ("teacher", "blind")})
    hub = output_dir / "hub" / f"{world.recipes}-llava-mod"
    # the package's own, as the embedded weights are that it is made of
    folder = run_publish(PublishCommand(str(checkpoint), str(hub), license="apache-2.0"))

    questions = world.asked(rows, summary["seed"], output_dir / "pictures")
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
