"""Batches of one modality and of similar length, of as many rows, or of as many tokens."""

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, get_length_grouped_indices

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


# Of this class, since the trainer takes it, and no other, for a sampler of whole batches of one process.
class TokenBatches(BatchRebalanceSampler):
    """
    The batches of an epoch for one process: as many rows of similar length and of one modality as hold, padded, no more
    than `budget` tokens.

    Rows of each modality are sorted by length, rounded up to five binary digits, and those of one length drawn anew for
    each epoch: every epoch has as many batches, which the trainer counts once. What all processes take at a time lies
    side by side in that order; these steps are shuffled, but the one with the longest row comes first. Every row comes
    once: batches are halved until there are as many for every process, and only where each is of one row do some come
    twice.

    Args:
        lengths (`list[int]`): tokens of each row.
        has_images (`list[bool]`): of each row.
        budget (`int`): tokens of a batch, padding included.
        processes, process (`int`): how many there are that read rows of their own, and which this is.
        seed (`int`).
        epoch (`Callable[[], int]`): the epoch that is about to begin, or to go on.

    Raises:
        ValueError: if a row is longer than the budget.
    """

    def __init__(self, lengths, has_images, *, budget, processes=1, process=0, seed, epoch):
        if max(lengths) > budget:
            raise ValueError(
                f"A row has {max(lengths)} tokens, and `max_tokens_per_batch` is {budget}: give at least as many, or a "
                "shorter `max_length`, which leaves such rows out."
            )
        self.lengths, self.budget = lengths, budget
        self.processes, self.process, self.seed, self.current_epoch = processes, process, seed, epoch
        keys = [(has_images, _rounded(length)) for length, has_images in zip(lengths, has_images, strict=True)]
        self._groups = {key: [] for key in sorted(set(keys), reverse=True)}  # images first, the longest first
        for row, key in enumerate(keys):
            self._groups[key].append(row)
        self._length = len(self._batches(torch.Generator())) // processes

    def __len__(self):
        return self._length

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.current_epoch())
        batches = self._batches(generator)
        steps = [batches[start : start + self.processes] for start in range(0, len(batches), self.processes)]
        shuffled = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
        longest = max(range(len(steps)), key=lambda i: max(self.lengths[row] for batch in shuffled[i] for row in batch))
        shuffled[0], shuffled[longest] = shuffled[longest], shuffled[0]
        yield from (step[self.process] for step in shuffled)

    def _batches(self, generator):
        """Those of all processes; how many depends on the lengths alone."""
        batches, modality, room = [], None, 0
        for (has_images, _), rows in self._groups.items():
            longest = max(self.lengths[row] for row in rows)
            for i in torch.randperm(len(rows), generator=generator).tolist():
                if has_images != modality or len(batches[-1]) == room:
                    batches.append([])
                    # by the longest of the group, so that it is the same whichever row comes first
                    modality, room = has_images, self.budget // longest
                batches[-1].append(rows[i])
        for missing in range(-len(batches) % self.processes):
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch = batches[largest]
            half = -(-len(batch) // 2)
            batches[largest : largest + 1] = [batch[:half], batch[half:] or batches[missing]]
        return batches


def _rounded(length):
    """A length, rounded up to one of five binary digits."""
    digits = max(length.bit_length() - 5, 0)
    return -(-length >> digits) << digits


class GroupedBatches:
    """
    For a trainer: `train_sampling_strategy: group_by_length` groups by modality as well as by length, and with
    `max_tokens_per_batch` into [`TokenBatches`].

    The parent reads the lengths from a column that it has removed before, or else from token ids, which rows with
    images do not have yet. Put this class before the trainer's own parent; the rows come from `fit_rows`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        budget = getattr(self.args, "max_tokens_per_batch", None)
        if budget is not None and isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            raise ValueError(
                f"`max_tokens_per_batch` is {budget}, and the rows are a stream, whose lengths nobody knows before: "
                "leave out `streaming`, or give `per_device_train_batch_size`."
            )

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
        options = {
            "seed": self.args.seed if self.args.data_seed is None else self.args.data_seed,
            # not `set_epoch`: accelerate does not reach a sampler behind skipped batches and several processes
            "epoch": lambda: int(self.state.epoch or 0),
        }
        lengths, has_images = rows[LENGTH][:], [count > 0 for count in rows[NUM_IMAGES]]
        budget, same_rows = getattr(self.args, "max_tokens_per_batch", None), self.get_tp_size()
        if budget is not None:
            processes, process = (
                self.accelerator.num_processes // same_rows,
                self.accelerator.process_index // same_rows,
            )
            return TokenBatches(lengths, has_images, budget=budget, processes=processes, process=process, **options)
        unit = self._train_batch_size * self.accelerator.num_processes
        return ModalityLengthSampler(lengths, has_images, unit=unit, **options)

    # for the same reason; evaluation reads rows in their order
    def _get_eval_sampler(self, eval_dataset):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset)
