"""`llava-mod info`: the size of a student, from its configuration alone."""

import contextlib
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForImageTextToText

from llava_mod_hf.commands.arguments import UpcycleArguments
from llava_mod_hf.commands.parts import check_experts, chosen_layers
from llava_mod_hf.loading import resolve
from llava_mod_hf.recipes import read_recipe
from llava_mod_hf.students.build import student_config
from llava_mod_hf.students.parameter_counts import count_parameters, parameter_parts
from llava_mod_hf.students.upcycling import moe_layer_indices, sparse_config
from llava_mod_hf.students.vision_layout import load_part, load_vision_layout, vision_config_of

OPTIONS = ("commands.arguments:UpcycleArguments", "commands.info:InfoCommand")

POSITIONAL = "model"  # what a first argument without a name is


@dataclass
class InfoCommand:
    """
    Args:
        model (`str`, *optional*): a LLaVA of this package or of transformers, or a recipe, `….yaml`, of one.
        vision_tower (`str`, *optional*): with `language_model`, instead of `model`: what a student would be made of.
        language_model (`str`, *optional*): its language model; as of the others, the `config.json` is enough.
        json (`bool`, *optional*, defaults to `False`): write JSON instead of a table.
        trust_remote_code (`bool`, *optional*, defaults to `False`).
    """

    model: str | None = None
    vision_tower: str | None = None
    language_model: str | None = None
    json: bool = False
    trust_remote_code: bool = False


def _recipes_of(folder):
    """The recipes of a folder; one that cannot be read is not that of an earlier stage."""
    found = []
    for path in sorted(folder.glob("*.yaml")):
        with contextlib.suppress(ValueError):
            found.append(read_recipe(path))
    return found


def recipe_chain(path, values):
    """
    What a recipe says, and what those of earlier stages beside it say, back to one whose student is there.

    Args:
        path (`str`): of the recipe.
        values (`dict`): what it says, or the `student` alone.

    Returns:
        `list[dict]`: `values` first.

    Raises:
        ValueError: if a `student` is no name.
    """
    recipes, chain = _recipes_of(Path(path).parent), []
    while values not in chain:
        chain.append(values)
        student = _name_in(values, "student", path)
        if student is None or (Path(resolve(student)) / "config.json").is_file():
            break
        # else a name of the Hub
        values = next((recipe for recipe in recipes if recipe.get("output_dir") == student), values)
    return chain


def experts_of(chain):
    """[`UpcycleArguments`] of the latest of such recipes that makes experts; without any, those that make none."""
    known = {item.name for item in dataclasses.fields(UpcycleArguments)}
    made = next((values for values in chain if values.get("moe_layers")), {})
    return UpcycleArguments(**{key: value for key, value in made.items() if key in known})


def _from_recipe(path, upcycle_args):
    """The parts that the student of a recipe is made of, found through the recipes of its earlier stages."""
    chain = recipe_chain(path, read_recipe(path))
    upcycle_args = experts_of(chain) if upcycle_args.moe_layers is None else upcycle_args
    names = {name: _name_in(chain[-1], name, path) for name in ("student", "vision_tower", "language_model")}
    if not (names["student"] or (names["vision_tower"] and names["language_model"])):
        raise ValueError(f"The recipe `{path}` names no `student`, nor a `vision_tower` and a `language_model`.")
    return names, upcycle_args


def _name_in(values, option, path):
    name = values.get(option)
    if not isinstance(name, str | None):
        raise ValueError(f"The recipe `{path}`, or that of an earlier stage, has `{option}: {name}`: give a name.")
    return name


def load_config(model=None, *, vision_tower=None, language_model=None, trust_remote_code=False):
    """
    Configuration of a LLaVA, or of the dense student that two parts would make.

    Args:
        model (`str`, *optional*): Hub name, folder or `embedded:…` name.
        vision_tower, language_model (`str`, *optional*): the same, both instead of `model`.
        trust_remote_code (`bool`, *optional*, defaults to `False`).

    Raises:
        ValueError: if neither or both are given, a name cannot be loaded, or `model` is no LLaVA.
    """
    if bool(model) == bool(vision_tower or language_model) or bool(vision_tower) != bool(language_model):
        raise ValueError("Give either a model or a recipe, or `--vision_tower` and `--language_model`.")
    remote = {"trust_remote_code": trust_remote_code}
    if model:
        config = load_part("model", model, AutoConfig.from_pretrained, resolve(model), **remote)
        if not hasattr(config, "vision_feature_layer"):
            raise ValueError(f"`{model}` is of type `{config.model_type}`, not a LLaVA: give one, or its parts.")
        return config
    path = resolve(vision_tower)
    tower_config = load_part("vision tower", vision_tower, AutoConfig.from_pretrained, path, **remote)
    text_config = load_part("language model", language_model, AutoConfig.from_pretrained, resolve(language_model))
    _, layout = load_vision_layout(tower_config, path, name=vision_tower, **remote)
    return student_config(vision_config_of(tower_config), text_config.get_text_config(), layout)


def student_info(config, upcycle_args=None):
    """
    What a model of this configuration is like; no weight is read or allocated.

    Args:
        config (`PreTrainedConfig`): of a LLaVA.
        upcycle_args ([`UpcycleArguments`], *optional*): experts that a dense one gets first.

    Returns:
        `dict`: `params_total`, `params_active`, `parts` (see [`parameter_parts`]), `context_length` and `image_tokens`
        in tokens, `moe_layers`, `num_experts`, `num_experts_per_tok`.

    Raises:
        ValueError: if experts are asked for in a model that has them, or the options do not fit.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        if upcycle_args is not None and upcycle_args.moe_layers is not None:
            model = AutoModelForImageTextToText.from_config(upcycled_config(model, upcycle_args))
    total, active = count_parameters(model)
    text_config = model.config.get_text_config()
    return {
        "params_total": total,
        "params_active": active,
        "parts": {part: count._asdict() for part, count in parameter_parts(model).items()},
        "context_length": getattr(text_config, "max_position_embeddings", None),
        "image_tokens": getattr(model.config, "image_seq_length", None),
        "moe_layers": list(getattr(text_config, "moe_layers", [])),
        "num_experts": getattr(text_config, "num_experts", None),
        "num_experts_per_tok": getattr(text_config, "num_experts_per_tok", None),
    }


def upcycled_config(model, args):
    """
    The config that upcycling with these options gives, without its weights.

    Args:
        model (`PreTrainedModel`): dense; on the meta device, it may be.
        args ([`UpcycleArguments`]).

    Raises:
        ValueError: if it is sparse already.
    """
    text_config = model.config.get_text_config()
    if getattr(text_config, "moe_layers", []):
        raise ValueError(f"The model is sparse already, in layers {text_config.moe_layers}: leave `moe_layers` out.")
    fields = {item.name: getattr(args, item.name) for item in dataclasses.fields(args)}
    layers = moe_layer_indices(chosen_layers(fields.pop("moe_layers")), text_config.num_hidden_layers)
    return sparse_config(model, moe_layers=layers, **fields)


def _report(info):
    table = Table("part", "parameters", "active per token", title=info["name"])
    for column in table.columns[1:]:
        column.justify = "right"
    for part, count in info["parts"].items():
        table.add_row(part, f"{count['total']:,}", f"{count['active']:,}")
    table.add_section()
    table.add_row("all", f"{info['params_total']:,}", f"{info['params_active']:,}")
    layers = ", ".join(map(str, info["moe_layers"]))
    experts = f"{info['num_experts']}, top-{info['num_experts_per_tok']}, in layers {layers}" if layers else "none"
    context = f"{info['context_length']} tokens, of which an image takes {info['image_tokens']}"
    return table, f"experts: {experts}", f"context: {context}"


def run(upcycle_args: UpcycleArguments, args: InfoCommand):
    """
    Writes the parameters of a student, by part, its experts, its context and its image tokens to standard output.

    Returns:
        `dict`: as [`student_info`], and `name`.
    """
    names = {"student": args.model, "vision_tower": args.vision_tower, "language_model": args.language_model}
    name = args.model or f"{args.vision_tower} + {args.language_model}"
    if args.model and args.model.endswith((".yaml", ".yml")):
        names, upcycle_args = _from_recipe(args.model, upcycle_args)
    check_experts(upcycle_args)
    config = load_config(names.pop("student"), **names, trust_remote_code=args.trust_remote_code)
    info = {"name": name, **student_info(config, upcycle_args)}
    if args.json:
        sys.stdout.write(json.dumps(info, indent=1) + "\n")
    else:
        Console().print(*_report(info), sep="\n", soft_wrap=True)
    return info
