"""A preference trainer of the shortest run, and its loss written out from the logits of every position."""

import torch
from torch.nn import functional as F

from helpers.ddp_gradients import EVERYTHING, RUN, rows
from llava_mod_hf import PreferenceConfig, PreferenceTrainer

BETA = 0.5


def uneven(dataset):
    """Pairs whose answers differ in length: every other rejected one is made longer."""

    def longer(row, index):
        ending = " of them all" if index % 2 else ""
        return {"rejected": [{**message, "content": message["content"] + ending} for message in row["rejected"]]}

    return dataset.map(longer, with_indices=True)


def preference_trainer(
    student, teacher, processor, folder, *, batch=4, accumulation=1, trainer=PreferenceTrainer, **args
):
    """`batch` and `accumulation` are short for the arguments' names; what the trainer itself takes goes to it."""
    own = ("teacher_processor", "peft_config", "eval_dataset", "callbacks")
    kwargs = {name: args.pop(name) for name in own if name in args}
    dataset = args.pop("dataset", None)
    config = PreferenceConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **{**RUN, "train_modules": EVERYTHING, "beta": BETA, "router_aux_loss_coef": 0.0, **args},
    )
    dataset = rows("preferences") if dataset is None else dataset
    return trainer(student, teacher, config, train_dataset=dataset, processing_class=processor, **kwargs)


def log_probabilities(model, batch):
    """Summed over the response, per sequence, in float64 from the logits of every position; and the token counts."""
    known = ("input_ids", "attention_mask", "pixel_values")
    log_probs = model(**{name: batch[name] for name in known if name in batch}).logits[:, :-1].double().log_softmax(-1)
    ids, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    sums = []
    for row in range(len(ids)):
        positions = mask[row].nonzero().flatten().tolist()
        sums.append(sum(log_probs[row, position, ids[row, position]] for position in positions))
    return torch.stack(sums), mask.sum(1)


def explicit_loss(name, student, teacher, batch, teachers_batch=None):
    """The loss of one micro-batch; the first half of a batch are the chosen responses, the second the rejected."""
    policy, lengths = log_probabilities(student, batch)
    with torch.no_grad():
        reference, _ = log_probabilities(teacher, batch if teachers_batch is None else teachers_batch)
    if name.endswith("_norm"):
        policy, reference = policy / lengths, reference / lengths
    (c, r), pairs = (policy - reference).chunk(2), len(policy) // 2
    if name.startswith("sigmoid"):
        return -F.logsigmoid(BETA * (c - r)).mean()
    if name == "hinge":
        return torch.stack([torch.clamp(1 - BETA * (c[i] - r[i]), min=0) for i in range(pairs)]).mean()
    if name.startswith("margin"):
        return sum(BETA * torch.clamp(r[i] - c[i], min=0) for i in range(pairs)) / pairs
    kl_c, kl_r = (max(0.0, sum(side.tolist()) / pairs) for side in (c, r))
    terms = [2 - torch.sigmoid(BETA * (c[i] - kl_r)) - torch.sigmoid(BETA * (kl_c - r[i])) for i in range(pairs)]
    return sum(terms) / (2 * pairs)
