"""
The command line as one of several processes of `accelerate launch`, on a CPU; says at its end how they worked together.

As `llava-mod`, with two differences. Accelerate turns FSDP on where the processes have accelerators of their own, and
leaves CPU processes to DDP, so that they are said to be of the other kind. DeepSpeed would compile operations of its
own for CPUs, which takes minutes, and whoever is ended meanwhile leaves a lock at which all later processes wait: they
speak by Gloo, as the others do.
"""

import os
import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import llava_mod_cli

made = PartialState.__init__


def as_accelerators(self, *args, **kwargs):
    made(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP"):
        PartialState.__init__ = as_accelerators
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
    sys.argv[0] = "llava-mod"
    code = llava_mod_cli.main()
    if torch.distributed.is_initialized():
        sys.exit("The processes' group was not ended.")
    state = AcceleratorState()
    sys.stdout.write(f"{state.num_processes} processes as {state.distributed_type.value}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    # With DeepSpeed on CPUs the interpreter's own end aborts now and then ("terminate called without an active
    # exception"), when all is written: what is tested here is before it.
    os._exit(code)
