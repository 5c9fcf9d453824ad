"""
Expected GPU memory of a recipe's stages, from the sizes in its models' configs; no weights are downloaded.

    python recipes/memory.py recipes/qwen2-0.5b [--processes 8] [--models FOLDER]

Per process, in bytes, for S parameters of the student of which T are trained, and P of the teacher:

    4 S              weights, float32, those of an adapter (`use_peft`) among them
    2 T              their bfloat16 copies, which autocast keeps during a step
    4 T + 8 T        gradients; AdamW's two moments
    2 P              the teacher in bfloat16 (4 P in float32); none with `teacher_cache`
    16 L             with `lora_target` of experts, for L weights of those of one layer: what the adapter adds to them,
                     the sum, and the gradients of both, float32
    4 · layers · width · batch · max_length    what gradient checkpointing keeps; twice the batch for pairs

ZeRO-2 divides gradients and moments by the processes, FSDP2 and ZeRO-3 the student's weights as well, `shard_teacher`
those of the teacher's layers. Not counted: what one layer needs while it runs, the chunk of logits, the CUDA context,
fragmentation.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
import yaml
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration
from llava_mod_hf.students.upcycling import moe_layer_indices
from llava_mod_hf.training.lora import lora_config
from llava_mod_hf.training.lora_options import LoraOptions
from llava_mod_hf.training.trainable import set_trainable

STAGES = ("1_adapt", "2_mimic_dense", "3_mimic_sparse", "4_prefer")
GB = 1e9


def load_config(name, models):
    local = Path(models) / name if models else None
    return AutoConfig.from_pretrained(local if local and local.exists() else name)


def student_config(adapt, recipe, models):
    """Config of the student of a stage: `adapt` says what it is made of, `recipe` which experts it has."""
    vision = load_config(adapt["vision_tower"], models)
    vision = getattr(vision, "vision_config", vision)
    text = load_config(adapt["language_model"], models)
    if "moe_layers" not in recipe:
        return LlavaModConfig(vision_config=vision, text_config=text)
    layers = recipe["moe_layers"]
    layers = layers[0] if isinstance(layers[0], str) else layers
    return LlavaModConfig(
        vision_config=vision,
        text_config=text,
        moe_layers=moe_layer_indices(layers, text.num_hidden_layers),
        num_experts=recipe["num_experts"],
        num_experts_per_tok=recipe["num_experts_per_tok"],
    )


def count(parameters):
    return sum(parameter.numel() for parameter in set(parameters))


def layer_parameters(model):
    """Those that `shard_teacher` shards: of the layers that transformers never splits."""
    layers = [module for module in model.modules() if type(module).__name__ in set(model._no_split_modules or ())]
    return [parameter for layer in layers for parameter in layer.parameters()]


def adapted(student, recipe):
    """The student with the adapter of a recipe, and L."""
    known = {item.name for item in dataclasses.fields(LoraOptions)}
    options = LoraOptions(**{name: value for name, value in recipe.items() if name in known})
    options.train_modules = recipe.get("train_modules")
    student.name_or_path = recipe["student"]
    model = get_peft_model(student, lora_config(options, student))
    layers: dict[str, int] = {}
    for name, module in model.named_modules():
        if hasattr(module, "parameter_name"):
            layer = name.partition(".mlp.")[0]
            layers[layer] = layers.get(layer, 0) + module.get_param().numel()
    return model, max(layers.values(), default=0)


def stage_memory(stage, recipe, student, teacher, processes, sums=0):
    """
    Parameters, and bytes per process; `sums` is L.

    Returns:
        `dict`: `total`, `trained` and `teacher` parameters; `whole`, `zero2`, `fsdp2` and `shard_teacher` bytes, the
        last for stages that have the option.
    """
    total = count(student.parameters())
    trained = count(parameter for parameter in student.parameters() if parameter.requires_grad)
    teacher_count = count(teacher.parameters()) if teacher else 0
    text = student.config.get_text_config()
    sequences = recipe["per_device_train_batch_size"] * (2 if stage == "4_prefer" else 1)
    kept = 4 * text.num_hidden_layers * text.hidden_size * sequences * recipe["max_length"] + 16 * sums
    weights, copies, updates = 4 * total, 2 * trained, 12 * trained
    teacher_size = 2 if recipe.get("teacher_dtype") in ("bfloat16", "float16") else 4
    teacher_bytes = teacher_count * teacher_size
    saved = teacher_size * count(layer_parameters(teacher)) * (1 - 1 / processes) if teacher else 0
    fsdp2 = (weights + copies + updates) / processes + teacher_bytes + kept
    return {
        "total": total,
        "trained": trained,
        "teacher": teacher_count,
        "whole": weights + copies + updates + teacher_bytes + kept,
        "zero2": weights + copies + updates / processes + teacher_bytes + kept,
        "fsdp2": fsdp2,
        "shard_teacher": fsdp2 - saved if "mimic" in stage else None,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="folder with the recipes of the stages")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--models", help="folder with <organisation>/<name>/config.json, for use without a network")
    args = parser.parse_args(argv)
    recipes = {stage: yaml.safe_load((args.recipe / f"{stage}.yaml").read_text()) for stage in STAGES}
    upcycled = args.recipe / "upcycle.yaml"  # an adapter's experts are made before
    sparse = yaml.safe_load(upcycled.read_text()) if upcycled.is_file() else recipes["3_mimic_sparse"]
    experts = {key: sparse[key] for key in ("moe_layers", "num_experts", "num_experts_per_tok")}
    for stage in ("3_mimic_sparse", "4_prefer"):  # the last one goes on with the student of the one before
        recipes[stage] = {**experts, **recipes[stage]}
    lines = [
        "| stage | student | trained | teacher | one GPU, or DDP | ZeRO-2 | FSDP2 | with `shard_teacher` |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for stage, recipe in recipes.items():
        with torch.device("meta"):
            student = LlavaModForConditionalGeneration(student_config(recipes["1_adapt"], recipe, args.models))
            teacher = None
            if "teacher" in recipe and "teacher_cache" not in recipe:
                teacher = AutoModelForImageTextToText.from_config(load_config(recipe["teacher"], args.models))
            sums = 0
            if recipe.get("use_peft"):
                student, sums = adapted(student, recipe)
        if not recipe.get("use_peft"):
            set_trainable(student, recipe.get("train_modules") or (["adaptor"] if stage == "1_adapt" else None))
        found = stage_memory(stage, recipe, student, teacher, args.processes, sums)
        millions = [f"{found[name] / 1e6:,.0f} M" for name in ("total", "trained", "teacher")]
        sizes = [found[name] for name in ("whole", "zero2", "fsdp2", "shard_teacher")]
        sizes = ["–" if size is None else f"{size / GB:.1f} GB" for size in sizes]
        lines.append(f"| {stage} | {' | '.join(millions + sizes)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
