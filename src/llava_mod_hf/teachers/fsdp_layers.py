"""Parameters that are spread over processes."""

from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def whole(parameter):
    """Under FSDP2 a parameter may be a shard, gathered here with its gradient's way back; others are as they are."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


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
