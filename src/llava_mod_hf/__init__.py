"""Small, fast vision-language models out of big ones, after LLaVA-MoD (arXiv 2408.15881)."""

import importlib

from llava_mod_hf.model.configuration_llava_mod import LlavaModConfig
from llava_mod_hf.model.modeling_llava_mod import LlavaModForConditionalGeneration, LlavaModModel

__version__ = "0.1.0"

# The trainers pull in TRL, which takes seconds: they are imported when asked for.
_LAZY = {
    "MimicConfig": "training.mimic_config",
    "MimicTrainer": "training.mimic_trainer",
    "PreferenceConfig": "training.preference_config",
    "PreferenceTrainer": "training.preference_trainer",
    "build_student": "students.build",
    "compress_experts": "students.compression",
    "convert_checkpoint": "students.conversion",
    "export_gguf": "students.gguf_export",
    "export_stock": "students.stock_export",
    "load_model_and_processor": "loading",
    "merge_experts": "students.stock_export",
    "push_checkpoint": "publishing.push",
    "upcycle": "students.upcycling",
}

__all__ = ["LlavaModConfig", "LlavaModForConditionalGeneration", "LlavaModModel", *sorted(_LAZY)]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
