"""Parameters that are spread over processes."""

import contextlib

from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx


def whole(parameter):
    """Under FSDP2 a parameter may be a shard, gathered here with its gradient's way back; others are as they are."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def whole_head(head, rows):
    """
    The first rows of a frozen model's head, in this process.

    Under ZeRO-3, which has spread them, a copy of what is gathered: they are read after the model's forward pass, when
    its hooks have let go of them.

    Args:
        head ([`~llava_mod_hf.losses.rows.Head`]): of the model's own parameters.
        rows (`slice`): of the vocabulary.

    Returns:
        [`~llava_mod_hf.losses.rows.Head`].
    """
    weight, bias = head.weight, head.bias
    if not hasattr(weight, "ds_status"):
        return head._replace(weight=weight[rows], bias=None if bias is None else bias[rows])
    with maybe_gather_lm_head_ctx(weight, bias):
        weight = weight.detach()[rows].clone()
        return head._replace(weight=weight, bias=None if bias is None else bias.detach()[rows].clone())


def shard_layers(model, accelerator):
    """
    Spreads the layers of a frozen model over the processes, each gathered for its own forward pass alone.

    What lies between them stays whole, above all the head, which the loss reads after the model's forward pass.

    Args:
        model (`PreTrainedModel`): changed in place.
        accelerator (`Accelerator`): of an FSDP2 run.
    """
    names = set(model._no_split_modules or ())
    mesh = accelerator.torch_device_mesh
    mesh = None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)


@contextlib.contextmanager
def of_its_own_class(model):
    """
    For a model that is saved with its code: FSDP2 gives it a class of its own, whose code is PyTorch's.

    Args:
        model (`torch.nn.Module`): a [`FSDPModule`] has the class that was sharded as long as this lasts.
    """
    sharded = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = next(each for each in sharded.__bases__ if each is not FSDPModule)
    try:
        yield
    finally:
        model.__class__ = sharded
