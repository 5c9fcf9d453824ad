"""Recipes: flat YAML through TRL's parser, where a key that no option reads is an error."""

import dataclasses
import difflib
from pathlib import Path

import yaml
from trl import TrlParser


def packaged(folder, name):
    """
    Path of a file that the wheel carries inside the package and the source tree beside it.

    Args:
        folder (`str`): `"recipes"` or `"model_cards"`.
        name (`str`): path below it.
    """
    package = Path(__file__).parent
    inside, beside = package / folder / name, package.parents[1] / folder / name
    return inside if inside.exists() else beside


def check_recipe(path, dataclass_types):
    """
    Refuses a recipe with a key that no option reads.

    Raises:
        ValueError: if the file is missing, is no mapping, or has an unknown key; the nearest option is named.
    """
    if not Path(path).is_file():
        raise ValueError(f"The recipe `{path}` does not exist.")
    try:
        values = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe `{path}` is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"The recipe `{path}` must hold `key: value` lines, and holds a {type(values).__name__}.")
    known = {item.name for group in dataclass_types for item in dataclasses.fields(group) if item.init} | {"env"}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "see `--help` for the keys."
            raise ValueError(f"The recipe `{path}` has the unknown key `{key}`: {hint}")


def parse(dataclass_types, argv, *, prog=None, description=None):
    """
    Dataclasses from `--config recipe.yaml` and `--key value` pairs, which override the recipe.

    Raises:
        ValueError: if the recipe is missing or has an unknown key, or a value does not fit.
        SystemExit: if a `--key` is unknown or required and missing, as in `argparse`.
    """
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in argv[:-1]:
        check_recipe(argv[argv.index("--config") + 1], dataclass_types)
    # no abbreviations: `--learning_rat` would be taken for `--learning_rate`
    parser = TrlParser(dataclass_types, prog=prog, description=description, allow_abbrev=False)
    return parser.parse_args_and_config(argv)
