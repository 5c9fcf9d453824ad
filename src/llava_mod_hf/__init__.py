"""Small, fast vision-language models out of big ones, after LLaVA-MoD (arXiv 2408.15881)."""

import importlib

from llava_mod_hf.configuration_llava_mod import LlavaModConfig
from llava_mod_hf.modeling_llava_mod import LlavaModForConditionalGeneration, LlavaModModel

__version__ = "0.1.0"

# The trainers pull in TRL, which takes seconds: they are imported when asked for.
_LAZY = {
    "MimicConfig": "mimic",
    "MimicTrainer": "mimic",
    "PreferenceConfig": "preference",
    "PreferenceTrainer": "preference",
    "build_student": "students",
    "convert_checkpoint": "conversion",
    "export_stock": "merging",
    "load_model_and_processor": "teacher",
    "merge_experts": "merging",
    "push_checkpoint": "hub",
    "upcycle": "upcycling",
}

__all__ = ["LlavaModConfig", "LlavaModForConditionalGeneration", "LlavaModModel", *sorted(_LAZY)]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
