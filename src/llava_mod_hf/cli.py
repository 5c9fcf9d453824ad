"""`llava-mod <command> [--config recipe.yaml] [--key value …]`."""

import importlib
import sys

# command → (module, function, names of its argument dataclasses in that module, what it does); imported when chosen,
# so that `--help` and a mistyped command answer at once
COMMANDS = {
    "adapt": (
        "commands.adapt",
        "adapt",
        (
            "data.load:DataArguments",
            "commands.arguments:StudentArguments",
            "training.adapt_trainer:AdaptConfig",
        ),
        "initialise the adaptor between vision encoder and language model",
    ),
    "mimic": (
        "commands.mimic",
        "mimic",
        (
            "data.load:DataArguments",
            "commands.arguments:DistillArguments",
            "commands.arguments:UpcycleArguments",
            "training.mimic_trainer:MimicConfig",
        ),
        "distil the teacher, dense-to-dense or dense-to-sparse",
    ),
    "prefer": (
        "commands.prefer",
        "prefer",
        (
            "data.load:DataArguments",
            "commands.arguments:DistillArguments",
            "training.preference_trainer:PreferenceConfig",
        ),
        "preference distillation with the teacher as reference",
    ),
    "cache-teacher": (
        "commands.cache_teacher",
        "run_cache_teacher",
        (
            "data.load:DataArguments",
            "commands.arguments:DistillArguments",
            "commands.arguments:UpcycleArguments",
            "training.mimic_trainer:MimicConfig",
            "commands.cache_teacher:CacheCommand",
        ),
        "write the teacher's answers once, to train from",
    ),
    "cache-reference": (
        "commands.cache_reference",
        "run_cache_reference",
        (
            "data.load:DataArguments",
            "commands.arguments:DistillArguments",
            "training.preference_trainer:PreferenceConfig",
            "commands.cache_reference:ReferenceCommand",
        ),
        "write the teacher's log-probabilities of pairs once, to train from",
    ),
    "generate-completions": (
        "commands.generate_completions",
        "run_generate_completions",
        (
            "data.load:DataArguments",
            "commands.generate_completions:GenerationArguments",
        ),
        "write a model's own answers, to train on",
    ),
    "make-preferences": (
        "commands.make_preferences",
        "run_make_preferences",
        (
            "data.load:DataArguments",
            "commands.make_preferences:PairArguments",
        ),
        "pairs of a model's best and worst answers",
    ),
    "convert": (
        "commands.convert",
        "run_convert",
        ("commands.convert:ConvertCommand",),
        "checkpoint of another layout → student",
    ),
    "upcycle": (
        "commands.upcycle",
        "run_upcycle",
        (
            "commands.arguments:UpcycleArguments",
            "commands.upcycle:UpcycleCommand",
        ),
        "dense student → sparse student",
    ),
    "export": (
        "commands.export",
        "run_export",
        ("commands.export:ExportCommand",),
        "student → stock model, without its code",
    ),
    "evaluate": (
        "commands.evaluate",
        "run_evaluate",
        (
            "data.load:DataArguments",
            "commands.evaluate:EvaluateCommand",
        ),
        "measure answers and hallucination",
    ),
    "info": (
        "commands.info",
        "run_info",
        (
            "commands.arguments:UpcycleArguments",
            "commands.info:InfoCommand",
        ),
        "parameters of a model, a recipe or two parts",
    ),
    "publish": (
        "commands.publish",
        "run_publish",
        ("commands.publish:PublishCommand",),
        "write a whole Hub repository, and push it",
    ),
    "quickstart": (
        "commands.quickstart",
        "quickstart",
        ("commands.quickstart:QuickstartArguments",),
        "the whole job on embedded data",
    ),
    "pretrain": (
        "commands.pretrain",
        "pretrain",
        ("commands.pretrain:PretrainConfig",),
        "regenerate the embedded weights",
    ),
}


def named(name):
    """What `module:name` of the package stands for."""
    module, _, name = name.partition(":")
    return getattr(importlib.import_module(f"llava_mod_hf.{module}"), name)


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
    groups = [named(name) for name in group_names]
    try:
        getattr(module, function_name)(*recipes.parse(groups, rest, prog=f"llava-mod {command}", description=summary))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"llava-mod {command}: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
