"""What a trainer asks of a teacher, and of a reference: whatever answers so can be given to it."""

from typing import Protocol

import torch

from llava_mod_hf.losses.rows import ProjectedRows, TopKRows


class Teacher(Protocol):
    """
    Who answers for a student's rows in [`~llava_mod_hf.MimicTrainer`].

    Attributes:
        shared_vocab_size (`int` or `None`): the first tokens, which its distributions are over; `None` for all.
    """

    shared_vocab_size: int | None

    def check_run(self, args, processor, rows):
        """
        Refuses a run that it cannot answer for; called once, with the trainer's own.

        Args:
            args ([`~llava_mod_hf.MimicConfig`]).
            processor (`ProcessorMixin`): the student's.
            rows (`datasets.Dataset` or `datasets.IterableDataset`): of training, or of evaluation.

        Raises:
            ValueError: naming what does not fit.
        """

    def collate(self, examples: list[dict], batch: dict) -> dict[str, torch.Tensor]:
        """Its own tensors of the rows `examples`, of which the student's collator made `batch`; may be none."""

    def check_alignment(self, examples: list[dict], batch: dict) -> float:
        """Share of the response tokens of a sample of rows that it says nothing about; refuses other responses."""

    def rows(self, student_inputs: dict, own_inputs: dict, labels: torch.Tensor) -> ProjectedRows | TopKRows:
        """What it says at each of the student's response tokens, from the student's inputs and what it collated."""


class Reference(Protocol):
    """Who says how likely the responses of pairs are, for [`~llava_mod_hf.PreferenceTrainer`]."""

    def check_run(self, args, processor, rows):
        """As [`Teacher.check_run`], with a [`~llava_mod_hf.PreferenceConfig`]."""

    def collate(self, examples: list[dict], batch: dict) -> dict:
        """
        What it adds to the batch that the student's collator made of the pairs `examples`.

        Returns:
            `dict`: log π of the responses, `ref_chosen_logps` and `ref_rejected_logps` of shape `(pairs,)` with their
            tails; or `reference_inputs`, the pairs as the model that is the reference reads them.
        """


def row_sets(train_dataset, eval_dataset):
    """The data sets that a trainer was given, as a list."""
    sets = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
    return [rows for rows in sets if rows is not None]
