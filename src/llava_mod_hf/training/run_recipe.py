"""The recipe of a run: every option of it, resolved."""

import dataclasses
import json
from dataclasses import dataclass


@dataclass
class Recipe:
    """Every option of a run, resolved, and those that somebody chose; plain YAML values, without the Hub token."""

    resolved: dict
    changed: dict


def recipe_of(*groups):
    """
    Args:
        groups: the argument dataclasses of a stage, or the trainer's alone, as they were before a trainer changed any.

    Returns:
        [`Recipe`].
    """
    resolved, changed = {}, {}
    for group in groups:
        required = {item.name for item in dataclasses.fields(group) if _has_no_default(item)}
        # without these three a TrainingArguments cannot be made everywhere
        required |= {"output_dir", "use_cpu", "bf16"} & {item.name for item in dataclasses.fields(group)}
        default = type(group)(**{name: getattr(group, name) for name in required})
        for item in dataclasses.fields(group):
            if item.init and item.name != "hub_token":
                value = getattr(group, item.name)
                resolved[item.name] = value
                if item.name in required or value != getattr(default, item.name):
                    changed[item.name] = value
    return Recipe(**json.loads(json.dumps({"resolved": resolved, "changed": changed}, default=_plain)))


def _plain(value):
    """`accelerator_config` is a dataclass once it is parsed; as a string the recipe could not be read again."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


def _has_no_default(item):
    return item.init and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
