"""What the tests of `live_teacher` and their likes share."""

import torch

from helpers.ddp_gradients import rows


def logits_of(hidden, head):
    """From hidden states to logits, written out in float64."""
    weight, bias, softcap, scale = head
    logits = hidden.double() @ weight.double().T
    logits = (logits if bias is None else logits + bias.double()) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def examples(count=4):
    return [dict(row) for row in rows(count=count)]
