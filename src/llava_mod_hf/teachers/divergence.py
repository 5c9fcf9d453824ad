"""How far a student is from a teacher that reads the rows through its own processor."""

import torch

from llava_mod_hf.data.conversations import AnswersCollator
from llava_mod_hf.data.marked_rows import leave_out_marked
from llava_mod_hf.evaluation.generating import evaluating, inputs_for
from llava_mod_hf.losses.divergences import divergence_rows
from llava_mod_hf.losses.rows import shift_for_next_token
from llava_mod_hf.teachers.live_teacher import LiveTeacher


def kl_to_live_teacher(model, processor, teacher, teacher_processor, dataset, *, batch_size=128):
    """
    [`~llava_mod_hf.evaluation.answers.kl_to_teacher`] of any teacher that may teach, over the tokens that it speaks
    about and the vocabulary that both share, as in training.

    Args:
        model, teacher (`PreTrainedModel`).
        processor, teacher_processor (`ProcessorMixin`): of each its own.
        dataset (`datasets.Dataset`): columns `images`, `prompt` and `completion` (messages).
        batch_size (`int`, *optional*, defaults to 128).

    Returns:
        `float`: in nats.

    Raises:
        ValueError: if the teacher does not fit, as [`~llava_mod_hf.teachers.live_teacher.LiveTeacher`] says, or has
            nothing to say about any answer.
    """
    dataset = leave_out_marked(dataset, processor, columns=("prompt", "completion"))
    collate = AnswersCollator(processor, completion_only_loss=True)
    live = LiveTeacher(
        teacher, student=model, processor=processor, teacher_processor=teacher_processor, collator=collate
    )
    total, count = torch.zeros((), dtype=torch.float64), 0
    with evaluating(model), evaluating(teacher):
        for start in range(0, len(dataset), batch_size):
            rows = dataset.select(range(start, min(start + batch_size, len(dataset))))
            examples = [dict(row) for row in rows.select_columns(["images", "prompt", "completion"])]
            batch = dict(collate([dict(example) for example in examples]))  # TRL's collator writes into the rows
            labels, own = batch["labels"].to(model.device), live.collate(examples, batch)
            own = {name: tensor.to(model.device) for name, tensor in inputs_for(teacher, own).items()}
            keep, _ = shift_for_next_token(labels)
            logits = model(**inputs_for(model, batch), logits_to_keep=keep).logits  # (answer tokens, vocabulary)
            said = live.rows(inputs_for(teacher, batch), own, labels)
            if said.aligned is not None:
                logits = logits[said.aligned]
            weight, bias = said.head.weight, said.head.bias
            theirs = said.head.finish(torch.nn.functional.linear(said.hidden, weight, bias)).to(logits.device)
            # ids behind those of the head are paddings, or tokens that one of the two has alone
            size = min(theirs.shape[-1], logits.shape[-1])
            total += divergence_rows(logits[:, :size], theirs[:, :size]).double().sum().cpu()
            count += len(logits)
    if count == 0:
        raise ValueError(f"Of the answers of {len(dataset)} rows the teacher speaks about no token: give other rows.")
    return total.item() / count
