"""What stands as reference of a preference loss: a teacher that reads the same pairs, or two numbers per pair."""

import json
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace

import torch
from transformers import PreTrainedConfig
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from llava_mod_hf.fingerprints import TEXT_COLUMNS, processor_parts
from llava_mod_hf.teachers.answer_cache import preference_settings
from llava_mod_hf.teachers.cached_rows import CachedRows
from llava_mod_hf.teachers.protocol import Reference
from llava_mod_hf.teachers.response_alignment import check_responses
from llava_mod_hf.teachers.vocabulary import check_teacher, shared_vocab_size

# log π(y⁺) and log π(y⁻), summed over the response; the names by which TRL reads them
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")

# of each, the tokens past the length of the pair's shorter response, which `ld_alpha` weighs less
TAIL_COLUMNS = ("ref_chosen_tail_logps", "ref_rejected_tail_logps")


class CachedReference:
    """
    What a teacher says of pairs, computed before: a few numbers each, found by the pair's words and images.

    Args:
        folder (`str`): of `llava-mod cache-reference`, or a data set of the Hub with one.
        expected (`dict`, *optional*): settings that it must have been made with, as for
            [`~llava_mod_hf.teachers.answer_cache.check_settings`].

    Raises:
        ValueError: if the cache is of another making, or not whole.
    """

    def __init__(self, folder, *, expected=None):
        self._cache = CachedRows(folder, command="llava-mod cache-reference", expected=expected)

    def check_run(self, args, processor, rows):
        """As [`~llava_mod_hf.teachers.protocol.Reference.check_run`]: the same settings, and all of the pairs."""
        check_images(next(iter(rows)))
        self._cache.check(preference_settings(args, processor), rows)

    def collate(self, examples, batch):
        """
        Returns:
            `dict[str, torch.FloatTensor]`: `REFERENCE_COLUMNS` and `TAIL_COLUMNS`, `(pairs,)` each.

        Raises:
            ValueError: if a pair is missing.
        """
        table = self._cache.find(examples)
        return {name: torch.tensor(table[name].to_pylist()) for name in REFERENCE_COLUMNS + TAIL_COLUMNS}


class ColumnsReference:
    """The reference's log-probabilities as columns of the rows."""

    def check_run(self, args, processor, rows):
        """Nothing: [`has_reference`] has looked at the columns."""

    def collate(self, examples, batch):
        """
        Returns:
            `dict[str, torch.FloatTensor]`: those of `REFERENCE_COLUMNS` and `TAIL_COLUMNS` that the rows have.
        """
        names = [name for name in REFERENCE_COLUMNS + TAIL_COLUMNS if name in examples[0]]
        return {name: torch.tensor([example[name] for example in examples]) for name in names}


class OwnReading:
    """
    The pairs as a reference with another processor reads them.

    Args:
        collator (`Callable`): of that processor.
    """

    def __init__(self, collator):
        self.collator = collator

    def check_run(self, args, processor, rows):
        """Nothing: [`own_reading`] has compared the responses."""

    def collate(self, examples, batch):
        """
        Returns:
            `dict`: `reference_inputs`, as a collator of pairs makes them.
        """
        return {"reference_inputs": dict(self.collator([dict(example) for example in examples]))}


class WholePairs:
    """
    The student's batches, without a pair that its collator would cut: a reference apart has the whole of it.

    Args:
        collator (`Callable`): the parent's.
    """

    def __init__(self, collator):
        self.max_length = getattr(collator, "max_length", None)
        whole = self.max_length is not None and is_dataclass(collator)
        self.collator = replace(collator, max_length=None) if whole else collator

    def __call__(self, examples):
        """
        Raises:
            ValueError: if a pair is longer than `max_length`.
        """
        # collators write into their examples
        batch = dict(self.collator([dict(example) for example in examples]))
        if self.max_length is not None:
            lengths = batch["attention_mask"].sum(1).reshape(2, -1).amax(0)  # (pairs,)
            if (lengths > self.max_length).any():
                longest = lengths.argmax().item()
                words = {name: examples[longest][name] for name in TEXT_COLUMNS if name in examples[longest]}
                raise ValueError(
                    f"A pair has {lengths[longest]} tokens, and `max_length` is {self.max_length}: the student would "
                    "read a part of it, and its reference has the whole. Raise `max_length`, or leave such rows out "
                    f"with `llava_mod_hf.data.fitting.fit_rows`: {json.dumps(words, default=str)[:200]}."
                )
        return batch


@dataclass
class PreferenceCollator:
    """
    The student's batches, with what the reference adds to them.

    Args:
        student ([`WholePairs`]).
        reference ([`~llava_mod_hf.teachers.protocol.Reference`]).
    """

    student: Callable
    reference: Reference

    def __call__(self, examples):
        batch = self.student(examples)
        return {**batch, **self.reference.collate(examples, batch)}


class NoReference(torch.nn.Module):
    """Stands where TRL wants a reference model, which it would load from the student's folder otherwise."""

    config = PreTrainedConfig()


def has_reference(rows, *, ld_alpha=None):
    """
    Whether rows carry the reference's log-probabilities.

    Raises:
        ValueError: if there is one of the two columns alone, or `ld_alpha` and no log-probabilities of the tails.
    """
    row = next(iter(rows))
    found = [name for name in REFERENCE_COLUMNS if name in row]
    if len(found) == 1:
        raise ValueError(f"The rows have the column `{found[0]}` alone: they need {' and '.join(REFERENCE_COLUMNS)}.")
    if found and ld_alpha is not None and not all(name in row for name in TAIL_COLUMNS):
        raise ValueError(
            f"`ld_alpha` is {ld_alpha}, which weighs the tokens past the shorter response of a pair apart, and the "
            f"rows need the columns {', '.join(TAIL_COLUMNS)} for it: add them, or leave out `ld_alpha`."
        )
    return bool(found)


def check_reference(args, teacher, cached):
    """
    There is exactly one reference: a teacher, the student itself, or columns of all rows.

    Args:
        args ([`~llava_mod_hf.PreferenceConfig`]).
        teacher (`PreTrainedModel`, [`~llava_mod_hf.teachers.protocol.Reference`] or `None`).
        cached (`list[bool]`): for each data set, whether it has the columns.

    Raises:
        ValueError: if there is none, or more than one, or it is of another kind.
    """
    if not (teacher is None or isinstance(teacher, torch.nn.Module) or hasattr(teacher, "collate")):
        raise ValueError(f"`ref_model` is a {type(teacher).__name__}: give a model that is loaded, or a reference.")
    columns = ", ".join(REFERENCE_COLUMNS)
    if any(cached) and not all(cached):
        raise ValueError(
            f"Some rows have the columns {columns} and some have not: compute those of training and evaluation rows, "
            "or of neither."
        )
    if any(cached) and (teacher is not None or args.reference == "self"):
        raise ValueError(
            "The rows carry their reference's log-probabilities, and there is another reference: leave out `ref_model` "
            f'and `reference="self"`, or remove the columns {columns}.'
        )
    if args.reference == "self" and teacher is not None:
        raise ValueError('`reference="self"` takes the student as it was, and there is a `ref_model`: leave one out.')
    if args.reference == "teacher" and teacher is None and not any(cached):
        raise ValueError(
            f"Preference distillation needs the teacher as `ref_model`, or rows with the columns {columns}, or "
            '`reference="self"`, and got none.'
        )


def check_images(row):
    """
    Raises:
        ValueError: if a row has no column of images, so that the parent has tokenized it once, for everybody.
    """
    if "images" not in row and "image" not in row:
        raise ValueError(
            "The reference reads the pairs apart from the student, and the rows have no column `images`: rows of text "
            "alone are tokenized once, for both. Give rows with `images`, empty lists for text."
        )


def own_reading(student, teacher, processor, teacher_processor=None, *, collate, examples):
    """
    How a teacher reads the pairs, checked.

    Args:
        student, teacher (`PreTrainedModel`).
        processor (`ProcessorMixin`): the student's.
        teacher_processor (`ProcessorMixin`, *optional*): the teacher's; without it, it reads the student's tensors.
        collate (`Callable`): the student's collator.
        examples (`list[dict]`): rows whose responses are compared where the two processors differ.

    Returns:
        [`OwnReading`] or `None`: `None` if teacher and student read the same tensors.

    Raises:
        ValueError: if vocabulary, tokenizer or image tokens do not fit, or the templates write other responses.
    """
    if teacher_processor is None or processor_parts(teacher_processor) == processor_parts(processor):
        check_teacher(student, teacher, processor, teacher_processor)
        return None
    shared_vocab_size(student, teacher, processor, teacher_processor)
    check_images(examples[0])
    token, expected = teacher_processor.image_token_id, teacher.config.image_token_id
    if token != expected:
        raise ValueError(
            f"The teacher's processor writes images as token {token} and its model reads {expected}: give the "
            "processor that belongs to it."
        )
    own = pair_collator(teacher_processor)
    batches = [collator([dict(example) for example in examples]) for collator in (WholePairs(collate), own)]
    labels, their_labels = (b["input_ids"].masked_fill(b["completion_mask"] == 0, -100) for b in batches)
    check_responses(labels, their_labels, processor.tokenizer)
    return OwnReading(own)


def pair_collator(processor):
    """TRL's collator of pairs with images, which cuts nothing off."""
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return DataCollatorForVisionPreference(processor)
