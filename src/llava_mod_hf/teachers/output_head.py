"""How a model makes logits of its last hidden states."""

import itertools

import torch

from llava_mod_hf.losses.rows import Head
from llava_mod_hf.model.modeling_llava_mod import logit_transform


@torch.no_grad()
def head_of(model):
    """
    How a model makes logits of its last hidden states, found out by a forward pass of one token.

        logits = softcap · tanh(scale · (W h + b) / softcap)

    Which of a family's options a class applies is not in its config: stock LLaVA over Gemma2 has a
    `final_logit_softcapping` and does not use it. So the head is made to answer known numbers, and the candidate that
    explains what the model makes of them is taken.

    Args:
        model (`PreTrainedModel`): with all its weights in this process.

    Returns:
        [`~llava_mod_hf.losses.rows.Head`], with the model's own parameters.

    Raises:
        ValueError: if the head is quantised, or no candidate explains the logits.
    """
    layer, config, name = model.get_output_embeddings(), model.config.get_text_config(), type(model).__name__
    if layer is None or not getattr(layer, "weight", None) is not None or not layer.weight.is_floating_point():
        raise ValueError(f"{name} has no output head with floating-point weights: leave `lm_head` unquantised.")
    values = [getattr(config, key, None) for key in ("logit_scale", "lm_head_multiplier", "output_multiplier")]
    scaling = getattr(config, "logits_scaling", None)  # Granite divides by it, HyperCLOVA X multiplies
    scales = [1.0, *(value for value in values if value), *((1 / scaling, scaling) if scaling else ())]
    softcaps = [None, *(v for v in [getattr(config, "final_logit_softcapping", None)] if v)]
    known = torch.linspace(-60, 60, layer.weight.shape[0], device=layer.weight.device)
    heads = []
    handle = layer.register_forward_hook(lambda module, args, output: known.to(output).expand_as(output))
    try:
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device)).logits[0, -1]
    finally:
        handle.remove()
    for scale, softcap in itertools.product(scales, softcaps):
        expected = known * scale if softcap is None else softcap * torch.tanh(known * scale / softcap)
        heads.append(((expected.to(logits) - logits).abs().max().item(), scale, softcap))
    error, scale, softcap = min(heads, key=lambda found: found[0])
    if error > 0.5:  # bfloat16 keeps 60 to within 0.25
        raise ValueError(f"{name} makes of its head's output what is no scale and no softcap: it cannot be a teacher.")
    return Head(layer.weight, getattr(layer, "bias", None), softcap, scale)


def head_without_weights(student):
    """
    As [`head_of`], without weights: a trainer reads these in each forward pass, as its wrappers move them.

    Args:
        student (`PreTrainedModel`).

    Returns:
        [`~llava_mod_hf.losses.rows.Head`] whose `weight` and `bias` are `None`.
    """
    if student.config.model_type == "llava_mod":
        scale, softcap = logit_transform(student.config.get_text_config())
        return Head(None, None, softcap, scale)
    return head_of(student)._replace(weight=None, bias=None)
