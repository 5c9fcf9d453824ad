"""Which parameters of a student are trained: its parts by name, in every stage."""

import contextlib

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.tensor import DTensor

# part → where transformers' vision-language models have it, below `base_model`
PARTS = {
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "adaptor": ("multi_modal_projector", "connector"),
    "language_model": ("language_model", "text_model"),  # with its head
    "ffn": ("language_model", "text_model"),  # of each of its layers: dense FFN, or experts and router
}

FROZEN_BY_TRAINER = "_frozen_by_trainer"


def check_train_modules(modules):
    """
    Raises:
        ValueError: unless `modules` is `None`, or a list of one or more of `vision_tower`, `adaptor`, `language_model`
            and `ffn`.
    """
    if modules is None:
        return
    if not isinstance(modules, list | tuple) or not modules or any(name not in PARTS for name in modules):
        raise ValueError(
            f"`train_modules` is {modules!r}: give a list of at least one of {', '.join(PARTS)}, or leave it out."
        )


def set_trainable(model, modules):
    """
    Freezes everything but the named parts.

    Args:
        model (`LlavaModForConditionalGeneration`, or another vision-language model of transformers).
        modules (`list[str]` or `None`):
            Of `vision_tower`, `adaptor`, `language_model` (with its head) and `ffn` (dense FFNs, experts, routers).
            `None`: as in the paper, language model and adaptor of a dense student, FFNs and adaptor of a sparse one.

    Raises:
        ValueError: if a name is unknown, or the model has no such part.
    """
    named = _named_parameters(model, default_modules(model) if modules is None else modules)
    model.requires_grad_(False)
    for parameter in model.parameters():
        setattr(parameter, FROZEN_BY_TRAINER, False)
    for parameter in named:
        parameter.requires_grad_(True)


def train_only(model, modules, default=None):
    """
    Freezes what a trainer does not train, and lets it take batches that reach nothing of the rest ([`keep_graph`]).

    What the caller has frozen before stays frozen.

    Args:
        model (`PreTrainedModel` or `PeftModel`).
        modules (`list[str]` or `None`): as in [`set_trainable`]. `None` with a peft adapter: what peft trains.
        default (`list[str]`, *optional*): for `None` without an adapter; the paper's, as in [`set_trainable`].

    Raises:
        ValueError: if a name is unknown, the model has no such part, or all of it is frozen already.
    """
    adapted = is_peft_model(model)
    if modules is None and not adapted:
        modules = default or default_modules(model)
    named = None if modules is None else {id(parameter) for parameter in _named_parameters(model, modules)}
    # what another trainer froze is free again, for a student passes through several stages; peft has frozen it for good
    free = [p for p in model.parameters() if p.requires_grad or (getattr(p, FROZEN_BY_TRAINER, False) and not adapted)]
    trained = [p for p in free if named is None or id(p) in named]
    if not trained:
        raise ValueError(
            f"Nothing is left to train: `train_modules` is {modules}, and all of that was frozen before"
            + (", as peft freezes all but its adapter." if adapted else ": set its `requires_grad` to `True`.")
        )
    chosen = {id(parameter) for parameter in trained}
    for parameter in free:
        parameter.requires_grad_(id(parameter) in chosen)
        setattr(parameter, FROZEN_BY_TRAINER, id(parameter) not in chosen)
    keep_graph(model)


@contextlib.contextmanager
def trained_as_before(model):
    """Undoes what peft does when an adapter is switched off and on again: it sets all of it to be trained."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def default_modules(model):
    """The paper's choice: language model and adaptor of a dense student, FFNs and adaptor of a sparse one."""
    return ["ffn" if getattr(model.config, "moe_layers", None) else "language_model", "adaptor"]


def _base(model):
    return model.get_base_model() if is_peft_model(model) else model


def _named_parameters(model, modules):
    check_train_modules(modules)
    model = _base(model)
    found = [parameter for name in modules for part in _part(model, name) for parameter in part.parameters()]
    return list({id(parameter): parameter for parameter in found}.values())


def _part(model, name):
    """The modules that a name stands for."""
    _, part = find_part(model, name)
    if name == "language_model":
        return [part, model.get_output_embeddings()]
    if name == "ffn":
        ffns = [getattr(layer, "mlp", None) for layer in getattr(part, "layers", ())]
        return ffns if ffns and None not in ffns else _refuse(model, name)
    return [part]


def find_part(model, name):
    """
    Attribute and module that a part of a model lies in.

    Args:
        model (`PreTrainedModel`).
        name (`str`): of [`PARTS`].

    Returns:
        `tuple[str, nn.Module]`.

    Raises:
        ValueError: if the model has no such part.
    """
    parts = [(attribute, getattr(model.base_model, attribute, None)) for attribute in PARTS[name]]
    return next((found for found in parts if isinstance(found[1], nn.Module)), None) or _refuse(model, name)


def _refuse(model, name):
    own = [attribute for attribute, _ in model.base_model.named_children()]
    raise ValueError(
        f"`{name}` is to be trained, and {type(model).__name__} has no such part that is known here, of "
        f"{', '.join(own)}: name other `train_modules`, or give a model that is built like a LLaVA."
    )


def keep_graph(model):
    """
    Lets a batch that reaches no trained parameter give a loss of gradient 0 instead of one without a gradient.

    Such a batch is one of text alone where only the adaptor is trained: its loss could not be differentiated, and with
    several processes the others would wait for its gradients for ever.

    Args:
        model (`PreTrainedModel` or `PeftModel`): gets a hook on what computes its last hidden states.
    """

    # Inside the wrapper's forward, where DDP looks for the parameters that a loss depends on. Those that FSDP2 has
    # spread at this moment are left out: gathering them would have to be done by every process.
    def add_zero(module, args, outputs):
        hidden = outputs.last_hidden_state
        if torch.is_grad_enabled() and not hidden.requires_grad:
            trained = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
            outputs.last_hidden_state = hidden + 0 * sum(p.sum().to(hidden.device) for p in trained)
        return outputs

    _base(model).base_model.register_forward_hook(add_zero)
