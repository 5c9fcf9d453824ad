"""Answers of the student in place of the data set's, for a share of the batches."""

import random

import torch
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages
from trl.models.utils import unwrap_model_for_generation

from llava_mod_hf.data.conversations import as_answers, is_whole, one_turn
from llava_mod_hf.data.formats import each_answer
from llava_mod_hf.data.marks import marks_of, without_marks
from llava_mod_hf.teachers.live_teacher import LiveTeacher


def check_on_policy(dataset, teachers):
    """
    Raises:
        ValueError: if the rows have no prompt to answer, or a teacher cannot judge new answers.
    """
    columns = next(iter(dataset)).keys()
    if not ({"images", "prompt", "completion"} <= columns or {"images", "messages"} <= columns):
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
    processes, all of them have to generate together. The answers are drawn by seed, step, process and place in the
    step, so that a resumed run gets those of a whole one, and what else is drawn is the same with and without them.

    Args:
        trainer ([`~llava_mod_hf.training.mimic_trainer.MimicTrainer`]).
        batches (`list[dict]`): of [`~llava_mod_hf.teachers.teachers_collator.TeachersCollator`], with `examples`.

    Returns:
        `list[dict]`: the chosen ones are collated anew, and marked by `on_policy`.
    """
    draw = torch.Generator().manual_seed(trainer.args.seed * 1_000_003 + trainer.state.global_step)
    chosen = torch.rand(len(batches), generator=draw) < trainer.args.on_policy_share
    answered = []
    # processes that share their rows have to draw the same answers
    rank, device = trainer.accelerator.process_index // trainer.get_tp_size(), trainer.accelerator.device
    devices = [] if device.type == "cpu" else [device]
    for place, (batch, by_student) in enumerate(zip(batches, chosen.tolist(), strict=True)):
        if by_student:
            with torch.random.fork_rng(devices, device_type=device.type):
                torch.manual_seed(answer_seed(trainer.args.seed, trainer.state.global_step, rank, place))
                examples = answered_by_student(trainer, batch["examples"])
            batch = {**trainer.data_collator(examples), "on_policy": True}
        answered.append(batch)
    return answered


def answer_seed(seed, step, rank, place):
    """`int`: of a micro-batch's answers; the four are told apart, where their sum would repeat."""
    return random.Random(f"{seed} {step} {rank} {place}").getrandbits(63)


def answered_by_student(trainer, examples):
    """
    The rows with completions that the student samples at temperature 1.

    Of a conversation one answer is drawn, and the turns before it are the prompt: there is one answer a row.

    An answer that is cut off by `on_policy_max_new_tokens` is followed by the end of the turn all the same: there the
    teacher says what it would go on with. A mark, such as the placeholder of a picture, is left out of an answer,
    whether the student says it as one token or spells it out: read again, it would be a picture that is not there.

    Args:
        trainer ([`~llava_mod_hf.training.mimic_trainer.MimicTrainer`]).
        examples (`list[dict]`): with `images`, `prompt` and `completion`, or `messages`; not changed.

    Returns:
        `list[dict]`.
    """
    processor, device = trainer.processing_class, trainer.accelerator.device
    examples = [_one_turn(example) for example in examples]
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
    marks = marks_of(processor)
    texts = [without_marks(text, marks) for text in texts]
    return [
        {**example, "completion": [{"role": "assistant", "content": text}] if is_conversational(example) else text}
        for example, text in zip(examples, texts, strict=True)
    ]


def _one_turn(example):
    """A row of one answer, drawn from those of a conversation."""
    example = as_answers(example)
    if not is_whole(example):
        return example
    turns = each_answer([*example["prompt"], *example["completion"]], len(example["prompt"]))
    return one_turn(example, turns[torch.randint(len(turns), ()).item()])


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
