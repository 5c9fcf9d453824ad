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
    "upcycle": ("commands", "run_upcycle", ("UpcycleArguments", "UpcycleCommand"), "dense student → sparse student"),
    "evaluate": ("commands", "run_evaluate", ("DataArguments", "EvaluateCommand"), "measure answers and hallucination"),
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
        lines = [f"  {name:12}{summary}\n" for name, (*_, summary) in COMMANDS.items()]
        sys.stdout.write("usage: llava-mod COMMAND [--config RECIPE.yaml] [--key value ...]\n\n" + "".join(lines))
        return 0
    command, *rest = argv
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
