"""How many rows of each data set of a mixture the steps of a run have read."""

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from llava_mod_hf.data.mixture import SOURCE, source_names


class RowsRead(TrainerCallback, ExportableState):
    """
    Counts rows by the data set that they are from, over all processes; checkpoints keep the counts.

    Args:
        names (`list[str]`): of the data sets.
    """

    def __init__(self, names):
        self.names = list(names)
        self.counts = [0] * len(names)  # of whole steps
        self.reduce = None  # sums a tensor over all processes
        self._step = torch.zeros(len(names), dtype=torch.long)

    def note(self, sources):
        """Takes in the data sets' numbers of a micro-batch."""
        self._step = self._step + torch.bincount(sources.cpu(), minlength=len(self.names))

    def state(self):
        return {"args": {"names": self.names}, "attributes": {"counts": self.counts}}

    def on_train_begin(self, args, state, control, **kwargs):
        kept = state.stateful_callbacks.get(type(self).__name__) or {}
        if state.global_step > 0 and kept.get("args", {}).get("names") == self.names:
            self.counts = list(kept["attributes"]["counts"])

    def on_step_end(self, args, state, control, **kwargs):
        step = self._step if self.reduce is None else self.reduce(self._step)
        self.counts = [count + more for count, more in zip(self.counts, step.tolist(), strict=True)]
        self._step = torch.zeros_like(self._step)


class WithSources:
    """A collator that also tells of each row which data set of a mixture it is from."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples):
        sources = torch.tensor([example[SOURCE] for example in examples])
        return {**self.collator(examples), SOURCE: sources}


class CountsRows(Trainer):
    """
    For a trainer: of rows with a `source_dataset`, those that the steps read are counted for each data set.

    Attributes:
        rows_read ([`RowsRead`] or `None`): the counts, if the training rows are a mixture.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if names := source_names(self.train_dataset):
            self.add_callback(RowsRead(names))

    @property
    def rows_read(self):
        # not kept: `restore_callback_states_from_checkpoint` puts others in the callbacks' place
        return next((each for each in self.callback_handler.callbacks if isinstance(each, RowsRead)), None)

    def _sum_over_processes(self, counts):
        if self.accelerator.num_processes == 1:
            return counts
        # processes of tensor parallelism read the same rows
        total = self.accelerator.reduce(counts.to(self.accelerator.device)).cpu()
        return total // self.get_tp_size()

    # The parent takes the columns that its collator reads, and gives evaluation the same collator.
    def get_train_dataloader(self):
        if self.rows_read is None:
            return super().get_train_dataloader()
        self._set_signature_columns_if_needed()
        columns, collator = self._signature_columns, self.data_collator
        self._signature_columns, self.data_collator = [*columns, SOURCE], WithSources(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self._signature_columns, self.data_collator = columns, collator

    # Here a step's batches are known, of training alone; before the parent's own counting, and before any model.
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if (counted := self.rows_read) is not None:
            counted.reduce = self._sum_over_processes
            for batch in batches:
                counted.note(batch.pop(SOURCE))
        return batches, num_items
