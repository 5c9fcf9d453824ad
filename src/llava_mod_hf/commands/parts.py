"""What several commands do with their options: they load a student, and make experts."""

import dataclasses

from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.students.upcycling import PLACEMENTS, upcycle


def load_without_adapter(name, **options):
    """
    [`~llava_mod_hf.loading.load_model_and_processor`] of what is to be changed, or trained.

    Raises:
        ValueError: if it is an adapter, whose weights would stand beside those of its student.
    """
    model, processor = load_model_and_processor(name, **options)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"`{name}` is an adapter: merge it with its student first, by `llava-mod merge-adapter`.")
    return model, processor


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
