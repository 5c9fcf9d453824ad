"""`llava-mod memory`: the GPU memory that the stages of a folder of recipes expect, from their models' sizes."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration
from llava_mod_hf.commands.parts import chosen_layers
from llava_mod_hf.loading import resolve
from llava_mod_hf.recipes import read_recipe
from llava_mod_hf.students.upcycling import moe_layer_indices
from llava_mod_hf.training.lora_options import LoraOptions
from llava_mod_hf.training.mimic_config import MimicConfig
from llava_mod_hf.training.stage_memory import GB, adapted, stage_memory
from llava_mod_hf.training.trainable import set_trainable

OPTIONS = ("commands.memory:MemoryCommand",)

POSITIONAL = "recipes"

STAGES = ("1_adapt", "2_mimic_dense", "3_mimic_sparse", "4_prefer")


@dataclass
class MemoryCommand:
    """
    Args:
        recipes (`str`): folder with the recipes of the stages, `1_adapt.yaml` to `4_prefer.yaml`.
        processes (`int`, *optional*, defaults to 8).
        models (`str`, *optional*):
            Folder with `<organisation>/<name>/config.json`, for use without a network; no weights are read.
    """

    recipes: str
    processes: int = 8
    models: str | None = None


def _load_config(name, models):
    local = Path(models) / name if models else None
    return AutoConfig.from_pretrained(local if local and local.exists() else resolve(name))


def _student_config(adapt, recipe, models):
    """Config of the student of a stage: `adapt` says what it is made of, `recipe` which experts it has."""
    vision = _load_config(adapt["vision_tower"], models)
    vision = getattr(vision, "vision_config", vision)
    text = _load_config(adapt["language_model"], models)
    if "moe_layers" not in recipe:
        return LlavaModConfig(vision_config=vision, text_config=text)
    return LlavaModConfig(
        vision_config=vision,
        text_config=text,
        moe_layers=moe_layer_indices(chosen_layers(recipe["moe_layers"]), text.num_hidden_layers),
        num_experts=recipe["num_experts"],
        num_experts_per_tok=recipe["num_experts_per_tok"],
    )


def _stages(folder):
    """`{stage: recipe}`, each with the experts of its student."""
    recipes = {stage: read_recipe(folder / f"{stage}.yaml") for stage in STAGES}
    upcycled = folder / "upcycle.yaml"  # an adapter's experts are made before
    sparse = read_recipe(upcycled) if upcycled.is_file() else recipes["3_mimic_sparse"]
    experts = {key: sparse[key] for key in ("moe_layers", "num_experts", "num_experts_per_tok")}
    for stage in ("3_mimic_sparse", "4_prefer"):  # the last one goes on with the student of the one before
        recipes[stage] = {**experts, **recipes[stage]}
    return recipes


def _lora_options(recipe):
    known = {item.name for item in dataclasses.fields(LoraOptions)}
    options = LoraOptions(**{name: value for name, value in recipe.items() if name in known})
    options.train_modules = recipe.get("train_modules")
    return options


def _memory_of(stage, recipe, adapt, args):
    with torch.device("meta"):
        student = LlavaModForConditionalGeneration(_student_config(adapt, recipe, args.models))
        teacher = None
        if "teacher" in recipe and "teacher_cache" not in recipe:
            teacher = AutoModelForImageTextToText.from_config(_load_config(recipe["teacher"], args.models))
        student.name_or_path = recipe.get("student", "")
        student, sums = adapted(student, _lora_options(recipe))
    if not recipe.get("use_peft"):
        set_trainable(student, recipe.get("train_modules") or (["adaptor"] if stage == "1_adapt" else None))
    vision = student.config.vision_config
    sequences = recipe["per_device_train_batch_size"] * (2 if stage == "4_prefer" else 1)
    return stage_memory(
        student,
        teacher,
        tokens=sequences * recipe["max_length"],
        image_tokens=sequences * (vision.image_size // vision.patch_size) ** 2,
        rows=recipe.get("rows_per_chunk", MimicConfig.rows_per_chunk) if "mimic" in stage else 0,
        teacher_bytes=2 if recipe.get("teacher_dtype") in ("bfloat16", "float16") else 4,
        processes=args.processes,
        sums=sums,
    )


def run(args: MemoryCommand):
    """Writes a table, a line each stage, to standard output; docs/check.md says what is counted."""
    recipes = _stages(Path(args.recipes))
    lines = [
        "| stage | student | trained | teacher | one GPU, or DDP | ZeRO-2 | FSDP2 | with `shard_teacher` |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for stage, recipe in recipes.items():
        found = _memory_of(stage, recipe, recipes["1_adapt"], args)
        millions = [f"{found[name] / 1e6:,.0f} M" for name in ("total", "trained", "teacher")]
        sizes = [found[name] for name in ("whole", "zero2", "fsdp2", "shard_teacher")]
        sizes = sizes if "mimic" in stage else [*sizes[:3], None]  # other stages have no such option
        cells = ["–" if size is None else f"{size / GB:.1f} GB" for size in sizes]
        lines.append(f"| {stage} | {' | '.join(millions + cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")
