"""Batches of one modality and of similar length."""

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from llava_mod_hf.data.fitting import LENGTH, NUM_IMAGES


class ModalityLengthSampler(Sampler):
    """
    The order of an epoch in which each run of `unit` rows is of one modality and of similar length.

    Rows with and without images are grouped by length each for themselves, in transformers' way (shuffled, and sorted
    by length within 50 units at most); then the units are shuffled, but the one with the longest row comes first, so
    that too little memory shows at once. Every row comes once. What fills no unit comes last, rows with images before
    those without, so that one batch of an epoch may hold both.

    transformers' own sampler for `group_by_length` draws from the global generator, whose state differs between
    processes and after a resumption; this one depends on seed and epoch alone.

    Args:
        lengths (`list[int]`): tokens of each row.
        has_images (`list[bool]`): of each row.
        unit (`int`): rows that are taken at the same time: batch size times processes.
        seed (`int`).
        epoch (`Callable[[], int]`): the epoch that is about to begin, or to go on.
    """

    def __init__(self, lengths, has_images, *, unit, seed, epoch):
        self.lengths, self.has_images = lengths, has_images
        self.unit, self.seed, self.epoch = unit, seed, epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        units, rest = [], []
        for modality in (True, False):
            rows = [index for index, has_images in enumerate(self.has_images) if has_images == modality]
            if not rows:
                continue
            order = get_length_grouped_indices([self.lengths[row] for row in rows], self.unit, generator=generator)
            full = len(rows) - len(rows) % self.unit
            units += [[rows[i] for i in order[start : start + self.unit]] for start in range(0, full, self.unit)]
            rest += [rows[i] for i in order[full:]]
        if units:
            shuffled = [units[i] for i in torch.randperm(len(units), generator=generator).tolist()]
            longest = max(range(len(units)), key=lambda i: max(self.lengths[row] for row in shuffled[i]))
            shuffled[0], shuffled[longest] = shuffled[longest], shuffled[0]
            units = shuffled
        yield from (row for unit in units for row in unit)
        yield from rest


class GroupedBatches:
    """
    For a trainer: `train_sampling_strategy: group_by_length` groups by modality as well as by length.

    The parent reads the lengths from a column that it has removed before, or else from token ids, which rows with
    images do not have yet. Put this class before the trainer's own parent; the rows come from `fit_rows`.
    """

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset  # the argument has lost its columns
        if self.args.train_sampling_strategy != "group_by_length" or isinstance(rows, torch.utils.data.IterableDataset):
            return super()._get_train_sampler(train_dataset)
        missing = [name for name in (LENGTH, NUM_IMAGES) if name not in rows.column_names]
        if missing:
            raise ValueError(
                f"`train_sampling_strategy` is `group_by_length`, and the rows have no {', '.join(missing)}: pass them "
                "through `fit_rows` first."
            )
        return ModalityLengthSampler(
            rows[LENGTH][:],
            [count > 0 for count in rows[NUM_IMAGES]],
            unit=self._train_batch_size * self.accelerator.num_processes,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            # not `set_epoch`: accelerate does not reach a sampler behind skipped batches and several processes
            epoch=lambda: int(self.state.epoch or 0),
        )

    # for the same reason; evaluation reads rows in their order
    def _get_eval_sampler(self, eval_dataset):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset)
