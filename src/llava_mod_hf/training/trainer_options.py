"""
Every option of the trainers' configs, once: read by the parent, read here, or refused in a sentence.

A test holds the tables against the installed transformers and TRL, so that an option that is new there is decided on.
"""

import dataclasses
import logging
import math
import numbers
import os
import types
import typing

import torch
from accelerate.utils import get_cpu_distributed_information
from peft import PeftModel
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

logger = logging.getLogger(__name__)

# Read by transformers' `Trainer` or TRL's trainer, in code that ours leave as it is.
READ_BY_PARENT = {
    "length": "num_train_epochs max_steps ignore_data_skip restore_callback_states_from_checkpoint",
    "batches": "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "auto_find_batch_size",
    "optimiser": "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay "
    "adam_beta1 adam_beta2 adam_epsilon optim_target_modules max_grad_norm neftune_noise_alpha",
    "precision": "bf16_full_eval fp16_full_eval tf32",
    "memory": "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing "
    "gradient_checkpointing_kwargs activation_offloading torch_empty_cache_steps",
    "logging": "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter "
    "include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project "
    "trackio_space_id trackio_bucket_id trackio_static_space_id skip_memory_metrics debug",
    "evaluation": "eval_strategy eval_steps eval_delay prediction_loss_only eval_on_start eval_do_concat_batches "
    "eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics do_eval",
    "saving": "save_only_model save_strategy save_steps save_on_each_node save_total_limit "
    "load_best_model_at_end metric_for_best_model greater_is_better",
    "Hub": "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    "reproducibility": "full_determinism",
    "devices": "use_cpu accelerator_config parallelism_config fsdp fsdp_config deepspeed ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout",
    "loader": "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns",
    "rows": "truncation_mode pad_token",
    "model": "model_init_kwargs",  # of a model that is given by its name; see `check_trainer`
}

READ_BY_PARENT_OF = {
    "adapt": "average_tokens_across_devices label_smoothing_factor loss_type eos_token dataset_text_field "
    "router_aux_loss_coef ddp_find_unused_parameters",
    "mimic": "eos_token dataset_text_field",
    "prefer": "disable_dropout f_divergence_type use_weighting f_alpha_divergence_coef discopop_tau "
    "ref_model_mixup_alpha ref_model_sync_steps ddp_find_unused_parameters",
}

# By our trainers, or by the stages of the command line.
READ_HERE = "output_dir seed data_seed bf16 fp16 max_length dataset_num_proc trust_remote_code train_sampling_strategy "

READ_HERE += (
    "resume_from_checkpoint train_modules use_peft lora_target lora_r lora_alpha lora_dropout use_rslora use_dora "
)

READ_HERE += "lora_target_modules lora_target_parameters lora_modules_to_save test_split_size eval_answers "

READ_HERE += "early_stopping_patience early_stopping_threshold hub_tag hub_gated vision_cache"

READ_HERE_OF = {
    "adapt": "chat_template_path completion_only_loss assistant_only_loss max_tokens_per_batch",
    "mimic": "average_tokens_across_devices router_aux_loss_coef completion_only_loss assistant_only_loss "
    "ddp_find_unused_parameters divergence temperature jsd_beta kl_weight lm_weight teacher_weights rows_per_chunk "
    "on_policy_share on_policy_max_new_tokens share_vision_tower shard_teacher reference_compat reference_vocab_size "
    "router_bias_update max_tokens_per_batch",
    "prefer": "router_aux_loss_coef loss_type loss_weights beta label_smoothing ld_alpha sync_ref_model reference "
    "kto_reference_compat share_prefix",
}

# `HubStrategy` has two more, which push the optimiser's state: pickles, that nobody should load from the Hub
HUB_STRATEGIES = ("end", "every_save")

LAUNCHERS = "local_rank"  # some write it on the command line, and the environment says it again: not read, not refused

ACCEPTED = {int: numbers.Integral, float: numbers.Real, str: (str, os.PathLike)}

ALL, SFT = ("adapt", "mimic", "prefer"), ("adapt", "mimic")

# (of which trainers, options, why they would do nothing)
REFUSED = (
    (ALL, "torch_compile torch_compile_backend torch_compile_mode",
     "the loss is computed around the model's forward pass, so nothing would be compiled"),
    (ALL, "use_liger_kernel liger_kernel_config", "Liger has no kernels for these models"),
    (ALL, "use_cache", "no step uses a cache, and what is saved has the language model's `use_cache`"),
    (ALL, "enable_jit_checkpoint", "every run saves a checkpoint at SIGTERM and SIGUSR1, after the step"),
    (ALL, "label_names", "the trainer knows the names of its labels"),
    (ALL, "length_column_name", "lengths are in the column that `fit_rows` writes"),
    (ALL, "do_train do_predict", "the trainer's methods are called by name, and a stage always trains"),
    (ALL, "padding_free", "rows with images are padded"),
    (ALL, "pad_to_multiple_of", "rows with images are padded to the longest of the batch"),
    (SFT, "packing packing_strategy eval_packing", "rows with images are not packed"),
    (SFT, "shuffle_dataset", "rows with images are shuffled by `train_sampling_strategy` alone"),
    (SFT, "dataset_kwargs", "rows with images are prepared batch by batch"),
    (("mimic",), "loss_type label_smoothing_factor", "mimic distillation has its own loss"),
    (("mimic",), "chat_template_path",
     "the student's rows are read by the template of its processor: set `processing_class.chat_template`"),
    (("prefer",), "label_smoothing_factor", "preference losses do not read it: give `label_smoothing`"),
    (("prefer",), "average_tokens_across_devices", "preference losses are means over pairs, not over tokens"),
    (("prefer",), "precompute_ref_log_probs precompute_ref_batch_size",
     "of rows with images `llava-mod cache-reference` computes them"),
)  # fmt: skip

# (of which trainers, options, what makes them read, whether that is so)
DEPENDENT = (
    (SFT, "max_tokens_per_batch", "`train_sampling_strategy: group_by_length`",
     lambda args: args.train_sampling_strategy == "group_by_length"),
    (ALL, "activation_offloading", "an accelerator",
     lambda args: torch.accelerator.is_available() and not args.use_cpu),
    (("mimic",), "divergence temperature teacher_weights share_vision_tower shard_teacher", "`kl_weight`",
     lambda args: args.kl_weight != 0),
    (("mimic",), "jsd_beta", "`divergence: jsd`", lambda args: args.divergence == "jsd"),
    (("mimic",), "on_policy_max_new_tokens", "`on_policy_share`", lambda args: args.on_policy_share != 0),
    (("prefer",), "f_alpha_divergence_coef", "`f_divergence_type: alpha_divergence`",
     lambda args: args.f_divergence_type == "alpha_divergence"),
    (("prefer",), "discopop_tau", "`loss_type: discopop`", lambda args: "discopop" in args.loss_type),
    (("prefer",), "ref_model_mixup_alpha ref_model_sync_steps", "`sync_ref_model`", lambda args: args.sync_ref_model),
)  # fmt: skip


def verdicts(stage):
    """`dict` of every option of a stage's config: `"read by parent"`, `"read by us"`, or `"refused: …"` with why."""
    groups = (
        ("read by parent", [*READ_BY_PARENT.values(), READ_BY_PARENT_OF[stage]]),
        ("read by us", [READ_HERE, READ_HERE_OF[stage]]),
        ("not read", [LAUNCHERS]),
    )
    found = [(name, verdict) for verdict, names in groups for name in " ".join(names).split()]
    found += [(name, f"refused: {why}") for name, why in _refused(stage)]
    twice = sorted({name for name, _ in found if [other for other, _ in found].count(name) > 1})
    if twice:
        raise ValueError(f"The tables name these options of `{stage}` twice: {', '.join(twice)}.")
    return dict(found)


def _refused(stage):
    return [(name, why) for stages, names, why in REFUSED if stage in stages for name in names.split()]


def check_options(args, stage):
    """
    Refuses an option that nothing would read. Called before the parent's checks, which fill in values of their own.

    Args:
        args (`TrainingArguments`): of the stage.
        stage (`str`): `adapt`, `mimic` or `prefer`.

    Raises:
        ValueError: naming the option and why it does nothing; if a value of TRL's or ours is of another type; or if
            `ddp_backend` is given to a process that is alone.
    """
    defaults = {item.name: _default(item) for item in dataclasses.fields(args)}
    for name, why in _refused(stage):  # other versions of TRL have not all of them
        if name in defaults and getattr(args, name) not in (defaults[name], None):  # None: what "auto" resolves to
            raise ValueError(f"`{name}` is {getattr(args, name)!r}, which would do nothing: {why}. Leave it out.")
    hints = typing.get_type_hints(type(args))
    for name in defaults.keys() - {item.name for item in dataclasses.fields(TrainingArguments)}:
        value, hint = getattr(args, name), hints[name]
        if not _fits(value, hint):
            kind = hint.__name__ if isinstance(hint, type) else hint
            raise ValueError(f"`{name}` is {value!r}: give a value of {kind}, or leave it out for {defaults[name]!r}.")
    # accelerate would look for the others, and say that no process group was made
    if args.ddp_backend is not None and not _is_launched():
        raise ValueError(
            f"`ddp_backend` is {args.ddp_backend!r}, and this is one process alone: start the stage with `accelerate "
            "launch` or `torchrun`, or leave it out."
        )


def _is_launched():
    """Whether a launcher, torch's or MPI's, has started this process, as accelerate finds it out."""
    several = get_cpu_distributed_information().world_size > 1
    return several or "LOCAL_RANK" in os.environ or torch.distributed.is_initialized()


def _fits(value, hint):
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    return any(_is(value, kind) for kind in kinds)


def _is(value, kind):
    origin = typing.get_origin(kind) or kind
    if origin is list:  # of one name alone, the option's own check speaks, or TRL makes a list
        (part,) = typing.get_args(kind)
        return (part is str and isinstance(value, str)) or (
            isinstance(value, list | tuple) and all(_is(item, part) for item in value)
        )
    if isinstance(value, bool):  # which is an `int` to Python
        return origin is bool
    return isinstance(value, ACCEPTED.get(origin, origin))


def check_dependent_options(args, stage):
    """
    Refuses an option that only another one makes read. Called after the parent's checks.

    Raises:
        ValueError: naming both.
    """
    defaults = {item.name: _default(item) for item in dataclasses.fields(args)}
    for stages, names, needed, is_read in DEPENDENT:
        known = [name for name in names.split() if stage in stages and name in defaults]
        changed = [name for name in known if getattr(args, name) != defaults[name]]
        if changed and not is_read(args):
            value = getattr(args, changed[0])
            raise ValueError(
                f"`{changed[0]}` is {value!r}, which does nothing without {needed}: give that too, or neither."
            )
    _check_hub_strategy(args.hub_strategy)


def _check_hub_strategy(strategy):
    name = str(getattr(strategy, "value", strategy))
    if name not in HUB_STRATEGIES:
        raise ValueError(
            f"`hub_strategy` is {name!r}, which pushes the optimiser's state, as pickles: give one of "
            f"{', '.join(HUB_STRATEGIES)}; checkpoints stay in `output_dir`."
        )


def _default(item):
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def check_libraries(args):
    """
    Refuses a logger or an optimiser whose library is not installed; the parent finds out when the models are loaded.

    Raises:
        ValueError: naming it.
    """
    _check_loggers(args)
    # only here: `--help` need not wait for it
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise ValueError(
            f"`optim` is `{args.optim.value}`, whose library is not installed ({' '.join(str(error).split())}): "
            "install it, or give `adamw_torch`."
        ) from error
    except ValueError:
        pass  # of one that asks for the model, too, and is told of it by the parent


# what of several packages for a logger needs least
SMALLEST = {"tensorboard": "tensorboardX", "azure_ml": "azureml-mlflow", "comet_ml": "comet-ml"}


def _check_loggers(args):
    installed = get_available_reporting_integrations()
    missing = [name for name in args.report_to if name not in (*installed, "flyte")]  # which is not looked for
    if not missing:
        return
    name, others = missing[0], ", ".join(installed) or "none"
    if name not in INTEGRATION_TO_CALLBACK:
        raise ValueError(f"`report_to` is {name!r}, which transformers does not know: give one of {others}.")
    package = SMALLEST.get(name, name)
    raise ValueError(
        f"`report_to` is {name!r}, and its library is not installed: `pip install {package}`, or give one of {others}."
    )


def check_weights(name, weights, *, count=None):
    """
    Args:
        name (`str`): of the option, or of the options together.
        weights (`list[float]` or `None`): `None` is right, and means the defaults.
        count (`int`, *optional*): how many there have to be.

    Raises:
        ValueError: if there is another number of them, or one is negative or no number, or all are 0.
    """
    if weights is None:
        return
    if not isinstance(weights, list | tuple) or not weights or (count is not None and len(weights) != count):
        number = "one or more numbers" if count is None else f"{count} numbers"
        raise ValueError(f"{name} is {weights!r}: give a list of {number}.")
    right = [math.isfinite(weight) and weight >= 0 for weight in weights]
    if not all(right) or not any(weights):
        raise ValueError(f"{name} is {weights!r}: give weights of 0 or more, not all of them 0.")


def check_trainer(args, config_class, model, *, teachers=(), peft_config=None, train_dataset=None, **arguments):
    """
    Refuses what a trainer is given and would not use.

    Args:
        args (`TrainingArguments`).
        config_class (`type`): what they have to be.
        model (`PreTrainedModel`, `PeftModel` or `str`).
        teachers (`list`, *optional*): models and other teachers, whose kind does not matter here.
        peft_config, train_dataset, arguments: the trainer's own.

    Raises:
        ValueError: naming it.
    """
    if not isinstance(args, config_class):
        raise ValueError(f"`args` is a {type(args).__name__}: give a {config_class.__name__}.")
    check_libraries(args)
    student = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(student, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"`{student.name_or_path}` was loaded with its adapter inside, which would be trained with the rest: merge "
            "it by `llava-mod merge-adapter`, or load it with `PeftModel.from_pretrained` to go on with it."
        )
    if any(getattr(teacher, "model", teacher) is student or teacher is student for teacher in teachers):
        raise ValueError("The teacher is the student itself, which would be frozen: give another model, or a copy.")
    configs = [*(model.peft_config.values() if isinstance(model, PeftModel) else ()), peft_config]
    for config in configs:
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"A {type(config).__name__} learns a prompt, whose tokens the loss does not reach: give an adapter of "
                "the weights, such as a `LoraConfig`."
            )
    for name, why in (
        ("compute_loss_func", "distillation has its own loss; a subclass may override `compute_loss`"),
        ("formatting_func", "rows with images are read as they are; map them before"),
    ):
        if arguments.get(name) is not None:
            raise ValueError(f"`{name}` would not be called: {why}. Leave it out.")
    if not isinstance(model, str):
        for name, value in (
            ("model_init_kwargs", args.model_init_kwargs),
            ("quantization_config", arguments.get("quantization_config")),
        ):
            if value is not None:
                raise ValueError(f"`{name}` is for a model given by its name, and this one is loaded: leave it out.")
        limit_max_length(args, student)
    field = getattr(args, "dataset_text_field", "text")
    columns = getattr(train_dataset, "column_names", None)
    if field != "text" and columns and field not in columns:
        raise ValueError(f"`dataset_text_field` is `{field}`, and the rows have {', '.join(columns)}: leave it out.")


def limit_max_length(args, student):
    """
    Keeps `max_length` within the student's positions, beyond which it has never been.

    Args:
        args (`TrainingArguments`): whose `max_length` is lowered if nobody chose it.
        student (`PreTrainedModel`).

    Raises:
        ValueError: if somebody chose more than the student has.
    """
    positions = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or (args.max_length is not None and args.max_length <= positions):
        return
    (default,) = (item.default for item in dataclasses.fields(args) if item.name == "max_length")
    if args.max_length not in (None, default):
        raise ValueError(
            f"`max_length` is {args.max_length}, and the student has {positions} positions: give at most that."
        )
    logger.warning("`max_length` is %d, as many as the student has positions.", positions)
    args.max_length = positions
