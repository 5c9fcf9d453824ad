"""What a stage holds in memory, from the sizes of its models alone; they may be on the meta device."""

from peft import get_peft_model

from llava_mod_hf.training.lora import lora_config

GB = 1e9


def count(parameters):
    """`int`: parameters, tied ones once."""
    return sum(parameter.numel() for parameter in set(parameters))


def layer_parameters(model):
    """Those that `shard_teacher` shards: of the layers that transformers never splits."""
    layers = [module for module in model.modules() if type(module).__name__ in set(model._no_split_modules or ())]
    return [parameter for layer in layers for parameter in layer.parameters()]


def adapted(student, options):
    """
    A student with the adapter that its stage's options ask for, if they ask for one.

    Args:
        student (`PreTrainedModel`): with the `name_or_path` that the recipe gives.
        options ([`~llava_mod_hf.training.lora_options.LoraOptions`]): with `train_modules`.

    Returns:
        `tuple[PreTrainedModel, int]`: it, and the weights of packed experts that the adapter adds to, of the layer with
        most of them; 0 without any.
    """
    config = lora_config(options, student)
    if config is None:
        return student, 0
    model = get_peft_model(student, config)
    layers: dict[str, int] = {}
    for name, module in model.named_modules():
        if hasattr(module, "parameter_name"):
            layer = name.partition(".mlp.")[0]
            layers[layer] = layers.get(layer, 0) + module.get_param().numel()
    return model, max(layers.values(), default=0)


# parameters: what a stage is, each a number of its own
def stage_memory(student, teacher=None, *, tokens, image_tokens=0, rows=0, teacher_bytes=4, processes=1, sums=0):
    """
    Parameters, and bytes per process with gradient checkpointing, bf16 by autocast and AdamW:

        4 S              weights, float32, those of an adapter (`use_peft`) among them
        2 T              their bfloat16 copies, which autocast keeps during a step
        4 T + 8 T        gradients; AdamW's two moments
        2 P              the teacher in bfloat16 (4 P in float32); none with `teacher_cache`
        16 L             with `lora_target` of experts, for L weights of those of one layer: what the adapter adds to
                         them, the sum, and the gradients of both, float32
        4 · (layers + 2) · width · tokens    what gradient checkpointing keeps, and what goes in and comes out
        16 · vision width · image tokens     what the adaptor keeps
        16 · vocabulary · rows               the logits of a chunk and their gradients, of student and teacher

    for S parameters of the student of which T are trained, and P of the teacher. ZeRO-2 divides gradients and moments
    by the processes, FSDP2 and ZeRO-3 the student's weights as well, `shard_teacher` those of the teacher's layers. Not
    counted: what one layer needs while it runs, the CUDA context, fragmentation.

    Args:
        student, teacher (`PreTrainedModel`): the former with `requires_grad` as the stage sets it.
        tokens (`int`): of a micro-batch, padding included; a pair has two sequences.
        image_tokens (`int`, *optional*, defaults to 0): of those, of images.
        rows (`int`, *optional*, defaults to 0): supervised tokens that are projected at a time, `rows_per_chunk`.
        teacher_bytes (`int`, *optional*, defaults to 4): of each of its parameters.
        processes (`int`, *optional*, defaults to 1).
        sums (`int`, *optional*, defaults to 0): L.

    Returns:
        `dict[str, int]`: `kept` bytes, those of the last four lines; `total`, `trained` and `teacher` parameters;
        `whole`, `zero2`, `fsdp2` and `shard_teacher` bytes.
    """
    total = count(student.parameters())
    trained = count(parameter for parameter in student.parameters() if parameter.requires_grad)
    teacher_count = count(teacher.parameters()) if teacher else 0
    text = student.config.get_text_config()
    kept = 4 * (text.num_hidden_layers + 2) * text.hidden_size * tokens + 16 * sums
    kept += 16 * (student.config.vision_config.hidden_size * image_tokens + text.vocab_size * rows)
    weights, copies, updates = 4 * total, 2 * trained, 12 * trained
    held = teacher_count * teacher_bytes
    saved = teacher_bytes * count(layer_parameters(teacher)) * (1 - 1 / processes) if teacher else 0
    fsdp2 = (weights + copies + updates) / processes + held + kept
    return {
        "kept": kept,
        "total": total,
        "trained": trained,
        "teacher": teacher_count,
        "whole": weights + copies + updates + held + kept,
        "zero2": weights + copies + updates / processes + held + kept,
        "fsdp2": fsdp2,
        "shard_teacher": fsdp2 - saved,
    }
