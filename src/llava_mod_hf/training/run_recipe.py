"""The recipe of a run: every option of it, resolved, and which of them a resumed run may change."""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import yaml

from llava_mod_hf.data.arguments import DatasetEntry
from llava_mod_hf.publishing.provenance import RECIPE_FILE

logger = logging.getLogger(__name__)

# Options that an interrupted run may be taken up with another value of; every other one changes what is learnt.
MAY_CHANGE = {
    "where": "output_dir resume_from_checkpoint hub_token trust_remote_code",
    "logging": "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level "
    "log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics debug",
    "saving": "save_strategy save_steps save_total_limit save_on_each_node",
    "Hub": "push_to_hub hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision hub_tag hub_gated",
    "evaluation": "eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size "
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
    "include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval",
    "workers": "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_multiprocessing_context dataset_num_proc check_images max_bad_rows",
    "memory": "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
    "activation_checkpointing_kwargs activation_offloading torch_empty_cache_steps rows_per_chunk teacher_device "
    "shard_teacher share_vision_tower share_prefix vision_cache",
    "processes": "local_rank ddp_backend ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_find_unused_parameters ddp_static_graph",
}

# may change too where the learning rate does not depend on them
LENGTH = {"max_steps", "num_train_epochs"}
CONSTANT = ("constant", "constant_with_warmup")

PROCESSES_FILE = "launch.yaml"  # of a checkpoint

SHOWN = 6  # differences that a refusal names


@dataclass
class Recipe:
    """
    Every option of a run, resolved, and those that somebody chose; plain YAML values, without the Hub token; and how
    many processes it was launched with, which no option says.
    """

    resolved: dict
    changed: dict
    processes: int = 1


def recipe_of(*groups):
    """
    Args:
        groups: the argument dataclasses of a stage, the trainer's last, as they were before a trainer changed any.

    Returns:
        [`Recipe`].
    """
    changed = {}
    for group in groups:
        required = {item.name for item in dataclasses.fields(group) if _has_no_default(item)}
        # without the first three a TrainingArguments cannot be made everywhere, and rows are of one of the others
        names = {"output_dir", "use_cpu", "bf16", "dataset_name", "datasets"}
        required |= names & {item.name for item in dataclasses.fields(group)}
        default = type(group)(**{name: getattr(group, name) for name in required})
        for name, value in _options(group).items():
            if (name in required and value is not None) or value != getattr(default, name):
                changed[name] = value
    return Recipe(resolved_options(*groups), _as_plain(changed), getattr(groups[-1], "world_size", 1))


def resolved_options(*groups):
    """`dict` of every option of argument dataclasses, as plain YAML values, without the Hub token."""
    return _as_plain({name: value for group in groups for name, value in _options(group).items()})


def _options(group):
    names = [item.name for item in dataclasses.fields(group) if item.init and item.name != "hub_token"]
    return {name: getattr(group, name) for name in names}


def _as_plain(options):
    return json.loads(json.dumps(options, default=_plain))


def _plain(value):
    """`accelerator_config` is a dataclass once it is parsed; as a string the recipe could not be read again."""
    if isinstance(value, DatasetEntry):
        return value.given()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


def _has_no_default(item):
    return item.init and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def check_same_recipe(checkpoint, recipe):
    """
    Refuses to take up a run with options that change what is learnt; [`MAY_CHANGE`] has those that do not.

    So does another number of processes, even with as many rows a step: each draws its own random numbers and answers,
    and router aux, `kto_pair` and `group_by_length` depend on the split.

    A checkpoint without a `recipe.yaml`, of another trainer, is not compared.

    Args:
        checkpoint (`str` or `Path`): that the run is taken up from.
        recipe ([`Recipe`]): of this start.

    Raises:
        ValueError: naming each option, its value then and now.
    """
    path = Path(checkpoint, RECIPE_FILE)
    if not path.is_file():
        logger.warning("`%s` has no %s, so nobody knows whether its options were the same.", checkpoint, RECIPE_FILE)
        return
    then = yaml.safe_load(path.read_text(encoding="utf-8"))
    free = {name for names in MAY_CHANGE.values() for name in names.split()}
    if recipe.resolved.get("lr_scheduler_type") in CONSTANT:
        free |= LENGTH
    if recipe.resolved.get("streaming"):
        free -= {"dataloader_num_workers"}  # each worker draws its own part of a stream
    # an option that was not there yet had the value that is the default now
    now = {name: value for name, value in recipe.resolved.items() if name in then or name in recipe.changed}
    other = [name for name in now if name not in free and now[name] != then.get(name)]
    told = [f"`{name}` was {then.get(name)!r} and is {now[name]!r}" for name in other]
    processes = _processes(checkpoint) or recipe.processes
    if processes != recipe.processes:
        told.insert(SHOWN - 1, f"the number of processes was {processes} and is {recipe.processes}")
    if told:
        more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
        raise ValueError(
            f"`{checkpoint}` is of a run with other options: {', '.join(told[:SHOWN])}{more}. Give them as they were "
            f"to go on, or begin from the start{_same_rows(then, processes, recipe.processes)} in another "
            "`output_dir`, or with `resume_from_checkpoint: false`."
        )


def _same_rows(then, processes, now):
    """How another number of processes reads as many rows a step, if it can."""
    steps, batch = (then.get(name) for name in ("gradient_accumulation_steps", "per_device_train_batch_size"))
    by_rows = then.get("max_tokens_per_batch") is None
    if processes == now or steps is None or batch is None or steps * processes % now or not by_rows:
        return ""
    return (
        f" (`gradient_accumulation_steps: {steps * processes // now}` then keeps the {batch * steps * processes} rows "
        "of a step)"
    )


def _processes(checkpoint):
    """`int` or `None`: how many processes wrote it; older checkpoints do not say."""
    path = Path(checkpoint, PROCESSES_FILE)
    return yaml.safe_load(path.read_text(encoding="utf-8"))["processes"] if path.is_file() else None


def write_processes(processes, folder):
    """Writes the number of processes beside a checkpoint's recipe, which is of options alone and can be run again."""
    Path(folder, PROCESSES_FILE).write_text(yaml.safe_dump({"processes": processes}), encoding="utf-8")


def write_recipe(recipe, folder):
    """Writes `recipe.yaml`, every option, into a folder."""
    Path(folder, RECIPE_FILE).write_text(yaml.safe_dump(recipe.resolved), encoding="utf-8")
