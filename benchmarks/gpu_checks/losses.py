"""The mimic and the preference losses, value and gradients, against sums in float64."""

import torch

from gpu_checks.cases import on_cuda, relative_error
from helpers.oracles import mimic_sums
from llava_mod_hf.losses.chunked_mimic import chunked_mimic_loss
from llava_mod_hf.losses.divergences import DIVERGENCES
from llava_mod_hf.losses.preference_losses import kto_pair_loss, margin_loss
from llava_mod_hf.losses.rows import Head, ProjectedRows

VOCABULARY = 32_000
LOSS_SCALE = 65536.0  # where GradScaler starts
# of the loss, and of its gradients: those of tests/losses/test_chunked_mimic_precision.py
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (0.02, 0.02), torch.float16: (1e-3, 3e-3)}
CLOSE = 0.1  # of gradients that are small next to the logits, which fp16 rounds
BETA = 0.3


def label(dtype):
    return str(dtype).removeprefix("torch.")


def inputs(dtype, device, *, rows, width=16, close=False):
    """Hidden states and heads; `close` makes the student's logits some per cent of the teacher's."""
    generator = torch.Generator().manual_seed(0)
    scale = 0.4 * width**-0.5
    hidden, weight, other = (
        (factor * torch.randn(size, width, generator=generator)).to(dtype)
        for factor, size in ((1.0, rows), (scale, VOCABULARY), (scale, VOCABULARY))
    )
    if close:
        tensors = hidden, weight, hidden, (weight + 0.03 * other).to(dtype)
    else:
        tensors = hidden, weight, hidden.flip(0), other
    return [tensor.to(device) for tensor in tensors]


def mimic_errors(tensors, divergence, *, bounds, expected=None, autocast=False, scale=1.0):
    """Of the loss and of its gradients of hidden states and head; gradients as an optimiser gets them, unscaled."""
    total, *sums = mimic_sums(divergence, *(expected or tensors), beta=0.3)
    leaves, items = [tensor.clone().requires_grad_() for tensor in tensors[:2]], max(len(tensors[0]), 1024)
    with torch.autocast(tensors[0].device.type, torch.float16, enabled=autocast):
        loss = chunked_mimic_loss(
            leaves[0],
            Head(leaves[1]),
            torch.zeros(len(leaves[0]), dtype=torch.long, device=leaves[0].device),
            [ProjectedRows(tensors[2], Head(tensors[3]))],
            divergence=divergence,
            jsd_beta=0.3,
            num_items=items,
        ).loss
    (scale * loss).backward()
    errors = [relative_error(leaf.grad.double() / scale, s / items) for leaf, s in zip(leaves, sums, strict=True)]
    return {
        "loss": (abs(loss.item() - total / items) / abs(total / items), bounds[0]),
        "hidden": (errors[0], bounds[1]),
        "head": (errors[1], bounds[1]),
    }


def mimic_cases(device):
    for rows in (1024, 8192) if on_cuda(device) else (32,):
        for dtype, bounds in BOUNDS.items():
            scale = LOSS_SCALE if dtype == torch.float16 else 1.0
            for divergence in DIVERGENCES:

                def run(rows=rows, dtype=dtype, bounds=bounds, scale=scale, divergence=divergence):
                    return mimic_errors(inputs(dtype, device, rows=rows), divergence, bounds=bounds, scale=scale)

                yield f"{divergence} {label(dtype)} {rows} rows", run

    wide = 1024 if on_cuda(device) else 16
    for dtype, bounds in BOUNDS.items():

        def run_wide(dtype=dtype, bounds=bounds):
            scale = LOSS_SCALE if dtype == torch.float16 else 1.0
            return mimic_errors(inputs(dtype, device, rows=wide, width=896), "forward_kl", bounds=bounds, scale=scale)

        yield f"forward_kl {label(dtype)} {wide} rows, width 896", run_wide

    for autocast in (False, True):

        def run_close(autocast=autocast):
            halves = inputs(torch.float16, device, rows=32, close=True)
            tensors = [tensor.float() for tensor in halves] if autocast else halves
            bounds = (None, CLOSE)
            return mimic_errors(
                tensors, "forward_kl", bounds=bounds, expected=halves, autocast=autocast, scale=LOSS_SCALE
            )

        yield f"near the teacher, {'fp16 autocast' if autocast else 'float16'}", run_close


def explicit_kto(chosen, rejected):
    """Value and gradients in float64 with the KL terms held constant."""
    kl_chosen, kl_rejected = (max(0.0, values.mean().item()) for values in (chosen, rejected))
    p, q = 1 / (1 + (-BETA * (chosen - kl_rejected)).exp()), 1 / (1 + (-BETA * (kl_chosen - rejected)).exp())
    count = 2 * len(chosen)
    value = ((1 - p) + (1 - q)).sum().item() / count
    return value, -BETA * p * (1 - p) / count, BETA * q * (1 - q) / count


def explicit_margin(student, teacher):
    below = teacher - student
    return BETA * below.clamp(min=0).mean().item(), -BETA * (below > 0).double() / len(below)


PREFERENCE_LOSSES = {"kto_pair": (kto_pair_loss, explicit_kto), "margin": (margin_loss, explicit_margin)}


def preference_cases(device):
    for name, (loss_function, explicit) in PREFERENCE_LOSSES.items():
        for dtype, bounds in BOUNDS.items():

            def run(loss_function=loss_function, explicit=explicit, dtype=dtype, bounds=bounds):
                generator = torch.Generator().manual_seed(0)
                given = [(2 * torch.randn(1024, generator=generator) + mean).to(dtype) for mean in (0.5, -0.25)]
                leaves = [tensor.to(device).requires_grad_() for tensor in given]
                scale = LOSS_SCALE if dtype == torch.float16 else 1.0
                loss = loss_function(*leaves, beta=BETA)
                (scale * loss).backward()
                value, *gradients = explicit(*(tensor.double() for tensor in given))
                found = {"loss": (abs(loss.item() - value) / abs(value), 1e-5)}  # summed in float32 at least
                for side, leaf, gradient in zip(("first", "second"), leaves, gradients, strict=False):
                    found[side] = (relative_error(leaf.grad.double() / scale, gradient), bounds[1])
                return found

            yield f"{name} {label(dtype)}", run
