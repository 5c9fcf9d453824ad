"""Recipes: flat YAML through TRL's parser, where a key that no option reads is an error."""

import dataclasses
import difflib
import types
import typing
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
    Refuses a recipe with a key that no option reads, or a value that is not of its option's kind.

    Raises:
        ValueError: as in [`read_recipe`], or if it has an unknown key, where the nearest option is named, or another
            kind of value.
    """
    values = read_recipe(path)
    known = {item.name for group in dataclass_types for item in dataclasses.fields(group) if item.init} | {"env"}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "see `--help` for the keys."
            raise ValueError(f"The recipe `{path}` has the unknown key `{key}`: {hint}")
    for group in dataclass_types:
        hints = typing.get_type_hints(group)
        for item in dataclasses.fields(group):
            hint = KINDS.get(item.name, hints[item.name])
            if item.name in values and not _fits(values[item.name], hint, item.default):
                kind = hint.__name__ if isinstance(hint, type) else str(hint)
                raise ValueError(
                    f"The recipe `{path}` has `{item.name}: {values[item.name]}`, which is of another kind than "
                    f"{kind}: give one of that, text in quotes."
                )


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice; the parent takes the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise ValueError(f"has the key `{twice[0]}` twice: give it once.")
        return super().construct_mapping(node, deep)


def read_recipe(path):
    """
    The `dict` of a recipe.

    Raises:
        ValueError: if the file is missing, is no text or no mapping, or has a key twice.
    """
    if not Path(path).is_file():
        raise ValueError(f"The recipe `{path}` does not exist, or is a folder.")
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe `{path}` is not valid YAML: {' '.join(str(error).split())}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The recipe `{path}` is no text in UTF-8 ({error}): save it as such.") from error
    except ValueError as error:
        raise ValueError(f"The recipe `{path}` {error}") from error
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise ValueError(f"The recipe `{path}` must hold `key: value` lines, and {what}.")
    return values


# where an option takes more than its parent class says
KINDS = {"resume_from_checkpoint": str | bool | None, "datasets": typing.Any}


def _fits(value, hint, default):
    """Whether an option may be this value of a recipe; of text the parser judges."""
    if isinstance(value, str) or (value is None and default is None):
        return True
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    return any(_is(value, typing.get_origin(kind) or kind) for kind in kinds)


def _is(value, kind):
    if kind is list:  # or one value without brackets
        items = value if isinstance(value, list) else [value]
        return not any(item is None or isinstance(item, dict | list) for item in items)
    if kind is bool:
        return value in (True, False)
    if kind is typing.Any or not isinstance(kind, type):  # `Literal`, say: the option's own check knows better
        return True
    if isinstance(value, bool):  # which is an `int` to Python
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _check_argv(argv):
    """Refuses an option that stands twice, of which the parser would take the last, and `--config` without a file."""
    names = [part.partition("=")[0].replace("-", "_") for part in argv if part.startswith("--")]
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        name = "--" + twice[0].lstrip("_")
        raise ValueError(f"`{name}` stands twice on the command line: give it once, a list with its values after it.")
    if "--config" in argv and not "".join(argv[argv.index("--config") + 1 :][:1]).strip("-"):
        raise ValueError("`--config` stands without a file: give the recipe's path after it.")


def parse(dataclass_types, argv, *, prog=None, description=None):
    """
    Dataclasses from `--config recipe.yaml` and `--key value` pairs, which override the recipe.

    Raises:
        ValueError: if the recipe is missing or has an unknown key, a value does not fit, or an option stands twice.
        SystemExit: if a `--key` is unknown or required and missing, as in `argparse`.
    """
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    _check_argv(argv)
    if "--config" in argv:
        check_recipe(argv[argv.index("--config") + 1], dataclass_types)
    # no abbreviations: `--learning_rat` would be taken for `--learning_rate`
    parser = TrlParser(dataclass_types, prog=prog, description=description, allow_abbrev=False)
    return parser.parse_args_and_config(argv)
