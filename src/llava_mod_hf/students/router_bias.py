"""The bias by which a student's routers may choose their experts, beside their probabilities (arXiv 2408.15664)."""

import torch

BIAS = "e_score_correction_bias"


def _routers(model):
    indices = getattr(model.config, "moe_layers", None) or ()
    return [model.base_model.language_model.layers[index].mlp.gate for index in indices]


def router_biases(model):
    """
    The biases of a student's routers.

    Args:
        model (`PreTrainedModel`): a student, maybe with a part that peft has put around its routers.

    Returns:
        `list[torch.FloatTensor | None]`: of each sparse layer, `(experts,)`; `None` where the router has none.
    """
    found = ([each for name, each in router.named_buffers() if name.endswith(BIAS)] for router in _routers(model))
    return [next(iter(biases), None) for biases in found]


def has_router_bias(model):
    """Whether a bias changes which experts a student's routers choose."""
    return any(bias is not None and bias.any().item() for bias in router_biases(model))


def add_router_bias(model):
    """
    Gives each router of a student a bias of 0, in place; those that have one keep it, in float32.

    Args:
        model (`LlavaModForConditionalGeneration`).

    Raises:
        ValueError: if the student has no routers, or its own code knows no bias.
    """
    routers = _routers(model)
    if not routers:
        raise ValueError(
            f"The {type(model).__name__} has no routers whose bias could be moved: leave out `router_bias_update`, or "
            "give a sparse student of this package, as `moe_layers` makes one."
        )
    for router in routers:
        if not hasattr(router, BIAS):
            raise ValueError(
                f"The student's own {type(router).__name__} knows no bias: leave out `router_bias_update`, or load the "
                "student with this package's code, without `trust_remote_code`."
            )
        bias = getattr(router, BIAS)
        if bias is None:
            bias = torch.zeros(model.config.num_experts, device=router.weight.device)
        router.register_buffer(BIAS, bias.float())
    model.config.router_bias = True
