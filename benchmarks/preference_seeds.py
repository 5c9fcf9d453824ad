"""
What preference distillation does to hallucination, over seeds: every reference and loss, and fine-tuning on the chosen.

    python benchmarks/preference_seeds.py --seeds 0 1 2 3 4 --runs 'runs/quickstart-{seed}' --table docs/preference.md

Each seed starts from the `mimic_sparse` checkpoint of a finished quickstart of easy-VQA, or makes it by its stages.
From there every variant takes the steps, batches and learning rate of `recipes/tiny/4_prefer.yaml` on the same pairs;
`chosen` is supervised fine-tuning on their chosen answers. All are judged on the quickstart's test questions, greedily.
`RESULTS/seed-N.json` is written after each variant, and a run goes on where it stopped.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

import datasets
from claims_statistics import T_QUANTILES
from transformers.utils import logging as hf_logging

from llava_mod_hf import recipes
from llava_mod_hf.commands import mimic, prefer
from llava_mod_hf.commands.quickstart_plan import EASY_VQA
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.evaluation.answers import evaluate_blind, evaluate_model
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.training import output_folder
from llava_mod_hf.training.output_folder import write_json

BEFORE = ("adapt", "mimic_dense", "mimic_sparse")
REFERENCES, LOSSES = ("teacher", "self"), ("sigmoid", "kto_pair", "margin")
VARIANTS = (*(f"{reference} {loss}" for reference in REFERENCES for loss in LOSSES), "chosen")
FIGURES = {
    "hallucination_rate": "hallucination",
    "miss_rate": "miss",
    "balanced_accuracy": "balanced accuracy",
    "exact_match": "exact match",
}
LOGGED = ("loss", "margins/teacher", "margins/student", "margins/below", "kto/clamped_chosen", "kto/clamped_rejected")


def student_of(seed, args):
    """Folder of the dense-to-sparse student of a seed, made if no finished quickstart is there."""
    folder = Path(args.runs.format(seed=seed))
    if not (folder / "mimic_sparse" / output_folder.RUN_FILE).is_file():
        for name in BEFORE:
            if not (folder / name / output_folder.RUN_FILE).is_file():
                steps = args.steps or EASY_VQA.parse(name, folder, seed)[-1].max_steps
                EASY_VQA.run(name, folder, seed, steps)
    return folder


def train(variant, folder, seed, args, output_dir):
    """Runs a variant from the `mimic_sparse` checkpoint in `folder`; returns what its trainer logged last."""
    options = ["--output_dir", str(output_dir), "--disable_tqdm", "false"]  # the loss on the bar, not on the output
    if args.steps:
        options += ["--max_steps", str(args.steps)]
    if variant == "chosen":
        # the mixture's rows are those of the pairs, and its completions the chosen answers
        chosen = ["--dataset_config", "mixture", "--kl_weight", "0", "--lm_weight", "1"]
        like = EASY_VQA.parse("prefer", folder, seed)[-1]
        same = ("max_steps", "per_device_train_batch_size", "learning_rate", "warmup_steps", "lr_scheduler_type")
        for name in same:
            value = getattr(like, name)
            chosen += [f"--{name}", str(getattr(value, "value", value))]
        argv = ["--config", str(recipes.packaged("recipes", "tiny/3_mimic_sparse.yaml")), "--seed", str(seed)]
        groups = recipes.parse(
            EASY_VQA.stages["mimic_sparse"].groups,
            [*argv, "--student", str(folder / "mimic_sparse"), *chosen, *options],
        )
        groups[2].moe_layers = None  # the student has its experts
        run = mimic.run(*groups)
    else:
        reference, loss = variant.split()
        options += ["--reference", reference, "--loss_type", loss]
        run = prefer.run(*EASY_VQA.parse("prefer", folder, seed, *options))
    last = [entry for entry in run["log_history"] if "loss" in entry][-1]
    return {name: last[name] for name in LOGGED if name in last}


def figures(result):
    return {name: result[name] for name in FIGURES}


def run_seed(seed, args):
    """Adds what is missing to the seed's file."""
    path = args.results / f"seed-{seed}.json"
    options = {"steps": args.steps, "num_questions": args.num_questions}
    found = json.loads(path.read_text()) if path.is_file() else {"seed": seed, "options": options, "models": {}}
    if found["options"] != options:
        raise SystemExit(
            f"`{path}` was begun with {found['options']}, and this run has {options}: give other `--results`."
        )
    models = found["models"]
    missing = [name for name in ("blind", "teacher", "before", *args.variants) if name not in models]
    if not missing:
        return
    rows = easy_vqa.load("questions", "test", seed)
    rows = rows.select(range(min(args.num_questions, len(rows))))
    folder = student_of(seed, args)
    for name in missing:
        logged = {}
        if name == "blind":
            result = evaluate_blind(easy_vqa.balanced(easy_vqa.questions("train"), seed), rows)
        else:
            with tempfile.TemporaryDirectory() as temporary:
                checkpoint = {"teacher": EASY_VQA.teacher, "before": str(folder / "mimic_sparse")}.get(name, temporary)
                if name in VARIANTS:
                    logged = train(name, folder, seed, args, temporary)
                result = evaluate_model(*load_model_and_processor(checkpoint), rows)
        models[name] = figures(result) | {"logged": logged}
        args.results.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        sys.stderr.write(f"seed {seed}, {name}: {figures(result)}\n")


def interval(values):
    """Mean and half width of the 95 % interval of the mean, by Student's t; the width is `None` for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, T_QUANTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def percent(mean, half_width, sign=""):
    width = "" if half_width is None else f" ± {100 * half_width:.1f}"
    return f"{100 * mean:{sign}.1f}{width}"


def table_of(names, seeds, difference_to=None):
    """Markdown rows: the means over seeds, or the means of the paired differences to another model."""
    lines = [f"| | {' | '.join(FIGURES.values())} |", "|---" * (len(FIGURES) + 1) + "|"]
    for name in names:
        cells = []
        for figure in FIGURES:
            values = [seed["models"][name][figure] for seed in seeds]
            if difference_to:
                values = [v - seed["models"][difference_to][figure] for v, seed in zip(values, seeds, strict=True)]
            cells.append(percent(*interval(values), sign="+" if difference_to else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def logged_table(names, seeds):
    """Markdown rows: what the trainers logged last."""
    lines = [f"| | {' | '.join(LOGGED)} |", "|---" * (len(LOGGED) + 1) + "|"]
    for name in names:
        cells = []
        for figure in LOGGED:
            values = [seed["models"][name]["logged"].get(figure) for seed in seeds]
            cells.append("" if None in values else f"{statistics.fmean(values):.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def report(args):
    """The Markdown page."""
    seeds = [json.loads((args.results / f"seed-{seed}.json").read_text()) for seed in args.seeds]
    command = f"python benchmarks/preference_seeds.py --seeds {' '.join(map(str, args.seeds))} --runs '{args.runs}' "
    command += f"--num-questions {args.num_questions}" + (f" --steps {args.steps}" if args.steps else "")
    steps = args.steps or EASY_VQA.parse("prefer", Path(args.runs), 0)[-1].max_steps
    lines = [
        "# Preference distillation on the embedded data",
        "",
        f"Seeds {', '.join(map(str, args.seeds))}; {args.num_questions} balanced test questions each; {steps} steps of "
        "`recipes/tiny/4_prefer.yaml` from the dense-to-sparse student. A variant is its reference and its loss; "
        "`chosen` is supervised fine-tuning on the chosen answers, with the same steps, batches and learning rate. In "
        "per cent, mean ± half width of the 95 % interval over seeds (Student's t).",
        "",
        "```bash",
        command,
        "```",
        "",
        *table_of(["blind", "teacher", "before", *args.variants], seeds),
        "",
        "## Paired differences to the student before",
        "",
        *table_of(args.variants, seeds, difference_to="before"),
        "",
    ]
    others = [name for name in args.variants if name != "chosen"]
    if "chosen" in args.variants and others:
        lines += ["## Paired differences to fine-tuning on the chosen answers", ""]
        lines += [*table_of(others, seeds, difference_to="chosen"), ""]
    lines += ["## What the last step logged", "", *logged_table(args.variants, seeds), ""]
    lines += [
        "hallucination: absent things claimed. miss: present things not seen. balanced accuracy: of questions whether "
        "a thing is there. exact match: of all questions. `margins/…` are log π(y⁺) − log π(y⁻) in nats on training "
        "pairs, `margins/below` the share of pairs whose student margin is below the teacher's, `kto/clamped_…` the "
        "share of KL estimates that were below 0.",
        "",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", default="runs/quickstart-{seed}", help="folders of quickstarts; `{seed}` is replaced")
    parser.add_argument("--results", type=Path, default=Path("runs/preference_seeds"), help="folder of the JSON files")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--steps", type=int, help="of every stage, instead of the recipes'")
    parser.add_argument("--num-questions", type=int, default=1500)
    parser.add_argument("--table", type=Path, help="Markdown file to write; by default standard output")
    parser.add_argument("--only-table", action="store_true", help="from the results that are there")
    args = parser.parse_args()
    if not 0 < len(args.seeds) <= len(T_QUANTILES) + 1:
        raise SystemExit(f"{len(args.seeds)} seeds: give 1 to {len(T_QUANTILES) + 1}.")
    if "{seed}" not in args.runs:
        raise SystemExit(f"`--runs` is `{args.runs}`: put `{{seed}}` where the seed stands.")
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    datasets.disable_progress_bars()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # about options that TRL's own defaults set
    for seed in () if args.only_table else args.seeds:
        run_seed(seed, args)
    text = report(args)
    if args.table:
        args.table.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
