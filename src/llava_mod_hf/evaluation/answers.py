"""What a student knows: exact match, hallucination, divergence from its teacher, and its size."""

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils.logging import is_progress_bar_enabled
from trl import prepare_multimodal_messages

from llava_mod_hf.data.conversations import AnswersCollator
from llava_mod_hf.data.easy_vqa import most_frequent_answers
from llava_mod_hf.data.formats import pictures_of
from llava_mod_hf.data.marked_rows import leave_out_marked
from llava_mod_hf.evaluation.generating import evaluating, generation_options, inputs_for, read_prompts
from llava_mod_hf.evaluation.measures import score
from llava_mod_hf.losses.divergences import divergence_rows
from llava_mod_hf.losses.rows import shift_for_next_token
from llava_mod_hf.students.parameter_counts import count_parameters


def _batches(dataset, columns, collate, batch_size, description):
    loader = DataLoader(
        dataset.select_columns(columns),
        batch_size=batch_size,
        collate_fn=collate,
        # without one of its own a loader draws from the global generator: evaluating would change the training
        generator=torch.Generator(),
    )
    # None: on a terminal alone, and below a training's bar it goes when it is done
    return tqdm(loader, desc=description, leave=None, disable=None if is_progress_bar_enabled() else True)


def response_batches(processor, dataset, *, batch_size, description):
    """
    Batches of prompt and reference answers, as the trainers see them: labels on the answers and their ends only.

    Raises:
        ValueError: if a text spells out a mark ([`~llava_mod_hf.data.marks.marks_of`]).
    """
    dataset = leave_out_marked(dataset, processor, columns=("prompt", "completion"))
    collate = AnswersCollator(processor, completion_only_loss=True)
    return _batches(dataset, ["images", "prompt", "completion"], collate, batch_size, description)


def generate_answers(model, processor, dataset, *, batch_size=128, max_new_tokens=64, keep=None):
    """
    Greedy answers to the prompts of a dataset.

    Args:
        model (`PreTrainedModel`): a student or a stock LLaVA.
        processor (`ProcessorMixin`): its processor, with a chat template.
        dataset (`datasets.Dataset`): columns `images` (lists of images, empty for text) and `prompt` (messages).
        batch_size (`int`, *optional*, defaults to 128): changes the speed, not the answers.
        max_new_tokens (`int`, *optional*, defaults to 64): where an answer without an end is cut.
        keep (`Callable[[list[str]], None]`, *optional*): called with the answers of each batch when they are there.

    Returns:
        `list[str]`: one answer per row, in their order, without special tokens.

    Raises:
        ValueError: as [`sample_answers`].
    """
    answers = sample_answers(
        model,
        processor,
        dataset,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        keep=keep and (lambda rows: keep([text for ((text, _),) in rows])),
    )
    return [text for ((text, _),) in answers]


# parameters: those of sampling, by the names that transformers' `generate` gives them
def sample_answers(
    model,
    processor,
    dataset,
    *,
    batch_size,
    max_new_tokens,
    num_answers=1,
    temperature=0.0,
    top_p=1.0,
    seed=0,
    keep=None,
):
    """
    Answers to the prompts of a dataset, greedy or sampled.

    Args:
        model, processor, dataset, batch_size, max_new_tokens: as in [`generate_answers`].
        num_answers (`int`, *optional*, defaults to 1): answers to each prompt.
        temperature (`float`, *optional*, defaults to 0.0): of the sampling; 0 takes the most likely token.
        top_p (`float`, *optional*, defaults to 1.0): sample among the most likely tokens of this total probability.
        seed (`int`, *optional*, defaults to 0): of the sampling; the same rows, batches and seed give the same answers.
        keep (`Callable[[list], None]`, *optional*): called with what is returned for the rows of each batch.

    Returns:
        `list[list[tuple[str, bool]]]`: per row `num_answers` texts without special tokens, and whether each has an end.
        A text may spell out a mark ([`~llava_mod_hf.data.marks.marks_of`]) in several tokens: who lets a model read it
        again leaves it out.

    Raises:
        ValueError: if a prompt spells out a mark, before any is answered.
    """
    dataset = leave_out_marked(dataset, processor)

    def collate(rows):
        return read_prompts(
            processor,
            [
                prepare_multimodal_messages(row["prompt"], images=pictures_of(row["prompt"], row["images"]))
                for row in rows
            ],
        )

    options = generation_options(
        model, processor, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
    ) | {"num_return_sequences": num_answers}
    ends = options["eos_token_id"]
    answers = []
    with evaluating(model), torch.random.fork_rng(enabled=temperature > 0):
        if temperature > 0:
            torch.manual_seed(seed)
        for batch in _batches(dataset, ["images", "prompt"], collate, batch_size, "Generating answers"):
            generated = model.generate(**inputs_for(model, batch), **options)
            new_tokens = generated[:, batch["input_ids"].shape[1] :]  # (batch · num_answers, new tokens)
            ended = torch.isin(new_tokens, torch.as_tensor(ends, device=new_tokens.device)).any(1).tolist()
            found = list(zip(processor.batch_decode(new_tokens, skip_special_tokens=True), ended, strict=True))
            batch_answers = [found[start : start + num_answers] for start in range(0, len(found), num_answers)]
            answers += batch_answers
            if keep is not None:
                keep(batch_answers)
    return answers


def kl_to_teacher(model, teacher, processor, dataset, *, batch_size=128, temperature=1.0):
    """
    Mean divergence of a student from its teacher on the tokens of the reference answers, in nats.

        KL = 1/N Σ_t Σ_v p_T(v|t) [log p_T(v|t) − log p_S(v|t)],   p = softmax(logits / temperature)

    over the N tokens t of all answers, the end token included, each given the reference before it.

    Args:
        model, teacher (`PreTrainedModel`): both with the given processor's vocabulary and image tokens.
        processor (`ProcessorMixin`): the processor of both.
        dataset (`datasets.Dataset`): columns `images`, `prompt` and `completion` (messages).
        batch_size (`int`, *optional*, defaults to 128).
        temperature (`float`, *optional*, defaults to 1.0).

    Returns:
        `float`.

    Raises:
        ValueError: if the two vocabularies differ in size, or if the dataset has no answer token.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    with evaluating(model), evaluating(teacher):
        for batch in response_batches(processor, dataset, batch_size=batch_size, description="Comparing to teacher"):
            keep, _ = shift_for_next_token(batch["labels"])  # (batch, sequence)
            student_logits, teacher_logits = (  # (answer tokens, vocabulary)
                each(**inputs_for(each, batch), logits_to_keep=keep.to(each.device)).logits for each in (model, teacher)
            )
            if student_logits.shape != teacher_logits.shape:
                raise ValueError(
                    f"The student's vocabulary has {student_logits.shape[-1]} tokens and the teacher's "
                    f"{teacher_logits.shape[-1]}: give a teacher with the student's tokenizer."
                )
            divergence = divergence_rows(
                student_logits, teacher_logits.to(student_logits.device), temperature=temperature
            )
            total += divergence.double().sum().cpu()
            count += len(divergence)
    if count == 0:
        raise ValueError(f"The {len(dataset)} rows have no answer token to compare on: give rows with a `completion`.")
    # the loss carries T² for the sake of its gradient; nats do not
    return total.item() / count / temperature**2


def _texts(dataset, name):
    texts = list(dataset[name])
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"Row {index} has the `{name}` {text!r}: give a text (docs/data.md says what is measured)."
            )
    return texts


def score_answers(answers, dataset):
    """
    All of [`~llava_mod_hf.evaluation.measures.MEASURES`] of answers to a dataset.

    Args:
        answers (`list[str]`): one per row.
        dataset (`datasets.Dataset`): columns `question`, `answer` and `kind`.

    Returns:
        `dict`.

    Raises:
        ValueError: if one of these columns holds something else than texts.
    """
    questions, references, kinds = (_texts(dataset, name) for name in ("question", "answer", "kind"))
    return score(predictions=answers, questions=questions, references=references, kinds=kinds)


def evaluate_model(model, processor, dataset, *, teacher=None, batch_size=128, answers=None):
    """
    All measures of a model on a dataset.

    Args:
        model (`PreTrainedModel`): a student or a stock LLaVA.
        processor (`ProcessorMixin`): its processor.
        dataset (`datasets.Dataset`): columns `images`, `prompt`, `completion`, `question`, `answer` and `kind`.
        teacher (`PreTrainedModel`, *optional*): what `kl_to_teacher` compares to.
        batch_size (`int`, *optional*, defaults to 128).
        answers (`list[str]`, *optional*): of the model to these rows, if it has been asked already.

    Returns:
        `dict`: what [`~llava_mod_hf.evaluation.measures.MEASURES`] give, each `None` where the dataset does not allow
        it (`exact_match`, `exact_match_by_kind`; `hallucination_rate`, `miss_rate`, `balanced_accuracy`; `chair_s`,
        `chair_i`, `object_recall`; `pope`), `kl_to_teacher` in nats (`None` without a teacher), `params_total` and
        `params_active`.
    """
    for name in ("question", "answer", "kind"):  # before hours of answers
        _texts(dataset, name)
    if answers is None:
        answers = generate_answers(model, processor, dataset, batch_size=batch_size)
    scores = score_answers(answers, dataset)
    divergence = None
    if teacher is not None:
        divergence = kl_to_teacher(model, teacher, processor, dataset, batch_size=batch_size)
    total, active = count_parameters(model)
    return scores | {"kl_to_teacher": divergence, "params_total": total, "params_active": active}


def blind_answers(train_rows, dataset):
    """
    What a model can answer without looking: each question's most frequent training answer.

    A question that the training rows never ask gets the most frequent answer of its kind, or else an empty one.

    Args:
        train_rows (`Iterable[dict]`): `question`, `answer` and `kind`.
        dataset (`datasets.Dataset`): columns `question` and `kind`.

    Returns:
        `list[str]`: one answer per row.
    """
    train_rows = list(train_rows)
    by_question = most_frequent_answers(train_rows)
    by_kind = most_frequent_answers({"question": row["kind"], "answer": row["answer"]} for row in train_rows)
    return [
        by_question.get(question, by_kind.get(kind, ""))
        for question, kind in zip(dataset["question"], dataset["kind"], strict=True)
    ]


def evaluate_blind(train_rows, dataset):
    """
    The measures of [`blind_answers`].

    Args:
        train_rows (`Iterable[dict]`): `question`, `answer` and `kind`.
        dataset (`datasets.Dataset`): columns `question`, `answer` and `kind`.

    Returns:
        `dict`: as [`evaluate_model`], without `kl_to_teacher` and the parameter counts.
    """
    return score_answers(blind_answers(train_rows, dataset), dataset)
