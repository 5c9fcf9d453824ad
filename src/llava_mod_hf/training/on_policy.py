"""Answers of the student in place of the data set's, for a share of the batches."""

import torch
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages
from trl.models.utils import unwrap_model_for_generation

from llava_mod_hf.teachers.live_teacher import LiveTeacher


def check_on_policy(dataset, teachers):
    """
    Raises:
        ValueError: if the rows have no prompt to answer, or a teacher cannot judge new answers.
    """
    columns = next(iter(dataset)).keys()
    if not {"images", "prompt", "completion"} <= columns:
        raise ValueError(
            f"`on_policy_share` needs rows with `images`, `prompt` and `completion`, and these have "
            f"{', '.join(sorted(columns))}: the student writes another completion of the prompt."
        )
    if not all(isinstance(teacher, LiveTeacher) for teacher in teachers):
        raise ValueError("`on_policy_share` needs live teachers: a cache knows the data set's answers alone.")


def answer_batches(trainer, batches):
    """
    Lets the student answer its share of a step's micro-batches.

    Which ones is drawn by the seed and the step, the same in every process: with weights that are spread over
    processes, all of them have to generate together. The answers are sampled by torch's generator, whose state the
    trainer saves and restores.

    Args:
        trainer ([`~llava_mod_hf.training.mimic_trainer.MimicTrainer`]).
        batches (`list[dict]`): of [`~llava_mod_hf.training.mimic_trainer.TeachersCollator`], with `examples`.

    Returns:
        `list[dict]`: the chosen ones are collated anew, and marked by `on_policy`.
    """
    draw = torch.Generator().manual_seed(trainer.args.seed * 1_000_003 + trainer.state.global_step)
    chosen = torch.rand(len(batches), generator=draw) < trainer.args.on_policy_share
    answered = []
    for batch, by_student in zip(batches, chosen.tolist(), strict=True):
        if by_student:
            examples = answered_by_student(trainer, batch["examples"])
            batch = {**trainer.data_collator(examples), "on_policy": True}
        answered.append(batch)
    return answered


def answered_by_student(trainer, examples):
    """
    The rows with completions that the student samples at temperature 1.

    An answer that is cut off by `on_policy_max_new_tokens` is followed by the end of the turn all the same: there the
    teacher says what it would go on with.

    Args:
        trainer ([`~llava_mod_hf.training.mimic_trainer.MimicTrainer`]).
        examples (`list[dict]`): with `images`, `prompt` and `completion`; not changed.

    Returns:
        `list[dict]`.
    """
    processor, device = trainer.processing_class, trainer.accelerator.device
    inputs = prompt_inputs(examples, processor)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    was_training = trainer.model.training
    with (
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
        torch.no_grad(),
        trainer.accelerator.autocast(),
    ):
        model.eval()
        ids = model.generate(**inputs, **settings, max_new_tokens=trainer.args.on_policy_max_new_tokens)
        model.train(was_training)
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [
        {**example, "completion": [{"role": "assistant", "content": text}] if is_conversational(example) else text}
        for example, text in zip(examples, texts, strict=True)
    ]


def prompt_inputs(examples, processor):
    """The prompts as a generating model reads them, padded on the left, as TRL's collator writes them."""
    prompts = []
    for example in examples:
        example = {name: example[name] for name in ("prompt", "images")}
        if is_conversational(example):
            example["prompt"] = prepare_multimodal_messages(example["prompt"], images=example["images"])
            example = apply_chat_template({"prompt": example["prompt"]}, processor)
        prompts.append(example["prompt"])
    images = [example["images"] for example in examples]
    return processor(
        images=images if any(images) else None,
        text=prompts,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=False,  # the template has written them
    )
