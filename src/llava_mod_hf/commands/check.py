"""`llava-mod check`: whether a stage is ready to run: data, models, memory, disk; no weights are read."""

import argparse
import contextlib
import json
import logging
import sys
from pathlib import Path

import torch

import llava_mod_cli
from llava_mod_hf import recipes
from llava_mod_hf.commands.check_stage import StageCheck

OPTIONS = ()  # those of the stage that it checks

STAGES = ("adapt", "mimic", "prefer")


def _parser():
    parser = argparse.ArgumentParser(
        prog="llava-mod check",
        description="Says whether a stage is ready to run, without a GPU and without reading weights.",
        epilog="Any further `--key value` is an option of the stage, as on its own command line. The exit code is 0 if "
        "it is ready, and 1 if something is to be mended.",
    )
    parser.add_argument("--config", help="the stage's recipe")
    parser.add_argument("--stage", choices=STAGES, help="by default told by the recipe's keys, and its name")
    parser.add_argument("--processes", type=int, default=1, help="that the stage will be launched with")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one GPU; more than that is to be mended")
    parser.add_argument("--models", help="folder with <organisation>/<name> of models, for use without a network")
    parser.add_argument("--all", action="store_true", help="open every picture, not 1,000 of them")
    parser.add_argument("--output", type=Path, help="file that the findings are written to, as JSON")
    return parser


def stage_of(recipe):
    """
    The stage whose options a recipe has.

    Args:
        recipe (`str`): its path.

    Returns:
        `str`: of `STAGES`.

    Raises:
        ValueError: if no stage knows all of its keys, or several do and its name is of none of them.
    """
    known, refusals = llava_mod_cli.commands(), {}
    for stage in STAGES:
        try:
            recipes.check_recipe(recipe, known[stage].groups())
        except ValueError as error:
            refusals[stage] = error
    found = [stage for stage in STAGES if stage not in refusals]
    named = [stage for stage in found or STAGES if stage in Path(recipe).stem]
    if not found:
        raise refusals[named[0] if named else "mimic"]
    if len(found) > 1 and len(named) != 1:
        raise ValueError(f"The recipe `{recipe}` may be one of {', '.join(found)}: say which by `--stage`.")
    return found[0] if len(found) == 1 else named[0]


@contextlib.contextmanager
def _quietly():
    """Without the package's warnings: what they say is told among the findings."""
    logger = logging.getLogger("llava_mod_hf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def run(argv):
    """
    Writes what was found to standard output, and at its end `ready`, or a list of what is to be mended.

    Args:
        argv (`list[str]`): of the command line.

    Returns:
        `int`: 0 or 1.
    """
    args, options = _parser().parse_known_args(argv)
    if args.processes < 1:
        raise ValueError(f"`--processes` is {args.processes}: give at least 1.")
    if args.config:
        options = ["--config", args.config, *options]
    elif args.stage is None:
        raise ValueError("Give a recipe by `--config`, or else `--stage` and its options.")
    stage = args.stage or stage_of(args.config)
    if not torch.cuda.is_available() and "--use_cpu" not in options:  # bf16 is refused by transformers otherwise
        options += ["--use_cpu", "true"]
    groups = recipes.parse(llava_mod_cli.commands()[stage].groups(), options, prog="llava-mod check")
    check = StageCheck(
        stage, groups, recipe=args.config, processes=args.processes, models=args.models, every_picture=args.all
    )
    with _quietly():
        found, problems = check.run(gpu_memory=args.gpu_memory)
    sys.stdout.write("\n".join(check.lines) + "\n")
    if problems:
        sys.stdout.write("\nto mend:\n" + "".join(f"{i}. {text}\n" for i, text in enumerate(problems, 1)))
    else:
        sys.stdout.write("\nready\n")
    if args.output:
        said = {"stage": stage, **found, "ready": not problems, "to_mend": problems}
        args.output.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return 1 if problems else 0
