"""What a case returns, and how errors are measured."""

import torch


class Skipped(Exception):
    """Raised by a case that cannot be run here; says why."""


def on_cuda(device):
    return torch.device(device).type == "cuda"


def need_cuda(device):
    if not on_cuda(device):
        raise Skipped("CUDA only")


def relative_error(found, expected):
    """Norm of the difference over the norm of what is expected, in float64 on the CPU."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def share_of_largest(found, expected):
    """Largest difference over the largest value that is expected, or over 1."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def gradient_errors(found, expected):
    """Of `{name: gradient}`: the relative error of all together, and that of the worst parameter that matters."""
    if found.keys() != expected.keys():
        raise ValueError(f"these have a gradient in one alone: {sorted(found.keys() ^ expected.keys())}")
    found, expected = ({name: g.double().cpu() for name, g in side.items()} for side in (found, expected))
    norms = {name: gradient.norm() for name, gradient in expected.items()}
    errors = {name: (found[name] - gradient).norm() for name, gradient in expected.items()}
    total = torch.stack(list(norms.values())).norm()
    overall = (torch.stack(list(errors.values())).norm() / total).item()
    matter = [name for name in norms if norms[name] > 1e-3 * total]
    return overall, max((errors[name] / norms[name]).item() for name in matter)
