"""`llava-mod <command> [--config recipe.yaml] [--key value …]`."""

import importlib
import sys

# command → (module, function, names of its argument dataclasses in that module, what it does); imported when chosen,
# so that `--help` and a mistyped command answer at once
COMMANDS = {
    "adapt": (
        "stages",
        "adapt",
        ("DataArguments", "StudentArguments", "AdaptConfig"),
        "initialise the adaptor between vision encoder and language model",
    ),
    "mimic": (
        "stages",
        "mimic",
        ("DataArguments", "DistillArguments", "UpcycleArguments", "MimicConfig"),
        "distil the teacher, dense-to-dense or dense-to-sparse",
    ),
    "prefer": (
        "stages",
        "prefer",
        ("DataArguments", "DistillArguments", "PreferenceConfig"),
        "preference distillation with the teacher as reference",
    ),
    "cache-teacher": (
        "caching",
        "run_cache_teacher",
        ("DataArguments", "DistillArguments", "UpcycleArguments", "MimicConfig", "CacheCommand"),
        "write the teacher's answers once, to train from",
    ),
    "cache-reference": (
        "reference_cache",
        "run_cache_reference",
        ("DataArguments", "DistillArguments", "PreferenceConfig", "ReferenceCommand"),
        "write the teacher's log-probabilities of pairs once, to train from",
    ),
    "generate-completions": (
        "completions",
        "run_generate_completions",
        ("DataArguments", "GenerationArguments"),
        "write a model's own answers, to train on",
    ),
    "make-preferences": (
        "pairs",
        "run_make_preferences",
        ("DataArguments", "PairArguments"),
        "pairs of a model's best and worst answers",
    ),
    "convert": ("commands", "run_convert", ("ConvertCommand",), "checkpoint of another layout → student"),
    "upcycle": ("commands", "run_upcycle", ("UpcycleArguments", "UpcycleCommand"), "dense student → sparse student"),
    "export": ("commands", "run_export", ("ExportCommand",), "student → stock model, without its code"),
    "evaluate": ("commands", "run_evaluate", ("DataArguments", "EvaluateCommand"), "measure answers and hallucination"),
    "info": ("info", "run_info", ("UpcycleArguments", "InfoCommand"), "parameters of a model, a recipe or two parts"),
    "publish": ("commands", "run_publish", ("PublishCommand",), "write a whole Hub repository, and push it"),
    "quickstart": ("quickstart", "quickstart", ("QuickstartArguments",), "the whole job on embedded data"),
    "pretrain": ("pretraining", "pretrain", ("PretrainConfig",), "regenerate the embedded weights"),
}


def main(argv=None):
    """
    Entry point of `llava-mod`.

    Returns:
        `int`: 0; 2 after bad input, with one sentence on standard error.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:22}{summary}\n" for name, (*_, summary) in COMMANDS.items()]
        sys.stdout.write("usage: llava-mod COMMAND [--config RECIPE.yaml] [--key value ...]\n\n" + "".join(lines))
        return 0
    command, *rest = argv
    if command == "info" and rest and not rest[0].startswith("-"):
        rest = ["--model", *rest]
    if command not in COMMANDS:
        sys.stderr.write(f"llava-mod: there is no command `{command}`: give one of {', '.join(COMMANDS)}.\n")
        return 2

    module_name, function_name, group_names, summary = COMMANDS[command]
    from llava_mod_hf import recipes

    module = importlib.import_module(f"llava_mod_hf.{module_name}")
    groups = [getattr(module, name) for name in group_names]
    try:
        getattr(module, function_name)(*recipes.parse(groups, rest, prog=f"llava-mod {command}", description=summary))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"llava-mod {command}: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
