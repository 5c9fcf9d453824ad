"""A teacher whose answers were written before."""

import torch

from llava_mod_hf.losses.rows import TopKRows, shift_for_next_token
from llava_mod_hf.teachers.answer_cache import mimic_settings
from llava_mod_hf.teachers.cached_rows import CachedRows
from llava_mod_hf.teachers.kept_answers import kept_by


class CachedTeacher:
    """
    A teacher whose answers were written before: nothing of it is loaded.

    Args:
        folder (`str`): a cache of `llava-mod cache-teacher`, or a data set of the Hub with one.
        expected (`dict`, *optional*): settings that it must have been made with, as for
            [`~llava_mod_hf.teachers.answer_cache.check_settings`].

    Attributes:
        shared_vocab_size (`int`): the first tokens, which the probabilities are over.

    Raises:
        ValueError: if the cache is of another making, or not whole.
    """

    def __init__(self, folder, *, expected=None):
        self.folder = folder
        self._cache = CachedRows(folder, command="llava-mod cache-teacher", expected=expected)
        self.settings = self._cache.settings
        self.shared_vocab_size = self.settings.get("vocabulary")
        self._kept = kept_by(self.settings)

    def check_run(self, args, processor, rows):
        """As [`~llava_mod_hf.teachers.protocol.Teacher.check_run`]: the same settings, and all of the rows."""
        self._cache.check(mimic_settings(args, processor, next(iter(rows))), rows)

    def collate(self, examples, batch):
        """
        What the cache says of a batch.

        Args:
            examples (`list[dict]`): rows as the data set yields them.
            batch (`dict`): what the student's collator made of them.

        Returns:
            `dict[str, torch.Tensor]`: `index` and `log_probs` `(aligned tokens, k)`, and `aligned` `(batch, sequence)`.

        Raises:
            ValueError: if a row is missing, or has another number of response tokens.
        """
        table = self._cache.find(examples)
        keep, _ = shift_for_next_token(batch["labels"])
        aligned = torch.zeros_like(keep)
        for row, (flags, number) in enumerate(zip(*(table[n].to_pylist() for n in ("aligned", "row")), strict=True)):
            if len(flags) != keep[row].sum():
                raise ValueError(
                    f"Row {number} of the cache `{self.folder}` has {len(flags)} response tokens, and the student "
                    f"reads {keep[row].sum()}: take the `max_length` that the cache was made with."
                )
            aligned[row, keep[row]] = torch.tensor(flags, dtype=torch.bool)
        index, log_probs = self._kept.read(table)
        return {"index": index, "log_probs": log_probs, "aligned": aligned}

    def check_alignment(self, examples, batch):
        """Share of the response tokens of a sample that the cache says nothing about; refuses what [`collate`] does."""
        keep, _ = shift_for_next_token(batch["labels"])
        aligned = self.collate(examples, batch)["aligned"]
        return 1 - (aligned.sum() / keep.sum().clamp(min=1)).item()

    def rows(self, student_inputs, own_inputs, labels):
        """
        As [`~llava_mod_hf.teachers.live_teacher.LiveTeacher.rows`], from what [`collate`] found.

        Returns:
            [`~llava_mod_hf.losses.rows.TopKRows`].
        """
        keep, _ = shift_for_next_token(labels)
        aligned = own_inputs["aligned"][keep]
        return TopKRows(own_inputs["index"].long(), own_inputs["log_probs"].float(), aligned)
