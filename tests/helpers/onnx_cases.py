"""What tests of ONNX graphs need, and students whose experts differ."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from llava_mod_hf.students.onnx_export import NEEDS

TRANSFORMERS_JS = Path(__file__).parents[2] / ".venv/transformers-js"


def libraries_or_skip():
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    _needed(not missing, f"{', '.join(missing)} not installed")


def transformers_js_or_skip():
    """The folder where npm installed it."""
    folder = Path(os.environ.get("TRANSFORMERS_JS", TRANSFORMERS_JS)).resolve()
    _needed((folder / "node_modules").is_dir(), "transformers.js is not installed")
    return folder


def _needed(there, what):
    """Skips, but not in `make test-onnx`, which installs everything."""
    if not there:
        (pytest.fail if os.environ.get("NEEDS_ONNX") else pytest.skip)(f"{what}: `make test-onnx`")


def different(model):
    """Experts and routers of a student that was just upcycled, away from each other."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.config.moe_layers:
            block = model.model.language_model.layers[layer].mlp
            block.gate.weight.normal_(generator=generator)
            for parameter in block.experts.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3 * parameter.std().clamp(min=0.1))
    return model.eval()
