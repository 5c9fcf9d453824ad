"""What several commands do with their options: they load models, make experts, fit rows."""

import dataclasses

from llava_mod_hf.data.fitting import fit_rows
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.students.upcycling import PLACEMENTS, upcycle
from llava_mod_hf.teachers.answer_cache import teacher_settings
from llava_mod_hf.training.trainer_options import limit_max_length


def load_student(args, trust_remote_code):
    """`(model, processor)` of the student that [`~llava_mod_hf.commands.arguments.DistillArguments`] name."""
    return load_model_and_processor(
        args.student, attn_implementation=args.attn_implementation, trust_remote_code=trust_remote_code
    )


def load_teacher(args, trust_remote_code):
    """`(model, processor)` of their teacher."""
    return load_model_and_processor(
        args.teacher,
        dtype=args.teacher_dtype,
        quantization=args.teacher_quantization,
        device=args.teacher_device,
        attn_implementation=args.attn_implementation,
        trust_remote_code=trust_remote_code,
    )


def load_teacher_or_cache(args, trust_remote_code, cached):
    """
    Who answers for the rows: what was written before if there is a `teacher_cache`, else the teacher itself.

    Args:
        args ([`~llava_mod_hf.commands.arguments.DistillArguments`]).
        trust_remote_code (`bool`).
        cached (`type`): what reads such a cache.

    Returns:
        `tuple`: the teacher, and its processor, `None` of a cache.
    """
    if args.teacher_cache:
        return cached(args.teacher_cache, expected=settings_of_teacher(args, trust_remote_code)), None
    return load_teacher(args, trust_remote_code)


def settings_of_teacher(args, trust_remote_code):
    """What a cache of the teacher has to be made with, for these arguments."""
    return teacher_settings(
        args.teacher,
        dtype=args.teacher_dtype,
        quantization=args.teacher_quantization,
        trust_remote_code=trust_remote_code,
    )


def check_experts(args):
    """
    Raises:
        ValueError: if [`~llava_mod_hf.commands.arguments.UpcycleArguments`] say what experts are like, and not where.
    """
    for item in dataclasses.fields(args):
        value = getattr(args, item.name)
        if args.moe_layers is None and value != item.default:
            raise ValueError(
                f"`{item.name}` is {value}, which does nothing without `moe_layers`: give that too, or neither."
            )


def chosen_layers(moe_layers):
    """`moe_layers` of a recipe as `upcycle` takes it: a placement's name, or indices."""
    # a recipe may give one value without brackets
    layers = moe_layers if isinstance(moe_layers, list) else [moe_layers]
    layers = [int(layer) if str(layer).lstrip("-").isdigit() else layer for layer in layers]
    names = [layer for layer in layers if isinstance(layer, str)]
    if names and len(layers) > 1:
        raise ValueError(f"`moe_layers` is {layers}: give one of {', '.join(PLACEMENTS)}, or indices alone.")
    return names[0] if names else layers


def upcycle_student(student, args, *, router_aux_loss_coef=None, seed=0):
    """`upcycle` with the options of a recipe; the student itself if the recipe asks for no experts."""
    if args.moe_layers is None:
        return student
    options = dataclasses.asdict(args)
    layers = chosen_layers(options.pop("moe_layers"))
    coef = {} if router_aux_loss_coef is None else {"router_aux_loss_coef": router_aux_loss_coef}
    return upcycle(student, layers=layers, seed=seed, **options, **coef)


def fit_to_recipe(rows, student, processor, data_args, args):
    """
    [`~llava_mod_hf.data.fitting.fit_rows`] with the options of a recipe, within the student's positions.

    Raises:
        ValueError: if rows are streamed without `max_steps`, or `max_length` is more than the student has positions.
    """
    limit_max_length(args, student)
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError("`streaming` is true, so nobody knows how many rows come: give `max_steps`.")
    rows, _ = fit_rows(
        rows,
        processor,
        max_length=args.max_length,
        multi_turn=data_args.multi_turn,
        assistant_only_loss=getattr(args, "assistant_only_loss", False),  # of pairs there is no such option
        bad_rows=data_args.bad_rows,
        num_proc=args.dataset_num_proc,
    )
    return rows
