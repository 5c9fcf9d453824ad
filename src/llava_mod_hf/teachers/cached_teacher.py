"""A teacher whose answers were written before."""

import json
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from huggingface_hub import snapshot_download

from llava_mod_hf.data.parquet_shards import check_shards
from llava_mod_hf.fingerprints import TEXT_COLUMNS, row_key, row_text_key
from llava_mod_hf.losses.rows import TopKRows, shift_for_next_token
from llava_mod_hf.teachers.answer_cache import check_settings

SAMPLE = 16  # rows whose images are compared at the start; every row's are when it is read


def _download(repo_id):
    return Path(snapshot_download(repo_id, repo_type="dataset", allow_patterns=["*.parquet", "*.yaml"]))


class CachedTeacher:
    """
    A teacher whose answers were written before: nothing of it is loaded.

    Args:
        folder (`str`): a cache of `llava-mod cache-teacher`, or a data set of the Hub with one.
        expected (`dict`, *optional*): settings that it must have been made with, as for [`check_settings`].
        weight (`float`, *optional*, defaults to 1.0): of its divergence, among several teachers.

    Attributes:
        shared_vocab_size (`int`): the first tokens, which the probabilities are over.

    Raises:
        ValueError: if the cache is of another making, or not whole.
    """

    command = "llava-mod cache-teacher"  # that makes such a cache

    def __init__(self, folder, *, expected=None, weight=1.0):
        self.folder, self.weight = folder, weight
        path = Path(folder) if Path(folder).is_dir() else _download(folder)
        self.settings = check_settings(path, expected or {})
        check_shards(path)
        self.shared_vocab_size = self.settings.get("vocabulary")
        files = sorted(str(file) for file in path.rglob("train-*.parquet"))
        self._rows = load_dataset("parquet", data_files=files, split="train").with_format("arrow")
        keys = self._rows.select_columns("key")[:]["key"].to_numpy(zero_copy_only=False).astype("S33")
        self._order = np.argsort(keys)
        self._keys = keys[self._order]

    def check_rows(self, rows):
        """
        Refuses a cache that lacks rows: compares all their words, and the images of a sample.

        Args:
            rows (`datasets.Dataset` or `datasets.IterableDataset`): what is trained on; of a stream nothing is read,
                and a missing row is refused when it comes.

        Raises:
            ValueError: with the number of missing rows and the first of them.
        """
        if not hasattr(rows, "__len__"):
            return
        texts = set(self._keys.astype("S16").tolist())
        words = rows.select_columns([name for name in TEXT_COLUMNS if name in rows.column_names])
        missing = [number for number, row in enumerate(words) if row_text_key(row).encode() not in texts]
        self._refuse(missing, len(rows), "words")
        sample = sorted(set(np.linspace(0, len(rows) - 1, SAMPLE).astype(int).tolist()))
        missing = [number for number in sample if self._places([row_key(rows[number])])[0] < 0]
        self._refuse(missing, len(sample), "images")

    def _refuse(self, missing, count, what):
        if missing:
            raise ValueError(
                f"The cache `{self.folder}` lacks {len(missing)} of {count} rows that were looked for, first row "
                f"{missing[0]}, whose {what} it does not have: make it of this data, by `{self.command}`."
            )

    def _places(self, keys):
        """Where rows are in the cache, −1 for those that are not."""
        keys = np.array(keys, "S33")
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._order[at], -1).tolist()

    def _found(self, examples):
        """Where the rows of a batch are in the cache; refuses one that is missing."""
        places = self._places([row_key(example) for example in examples])
        if -1 in places:
            first = examples[places.index(-1)]
            words = {name: first[name] for name in TEXT_COLUMNS if name in first}
            raise ValueError(
                f"The cache `{self.folder}` lacks {places.count(-1)} of {len(places)} rows of a batch, first the one "
                f"with {json.dumps(words, default=str)[:200]}: make it of this data, by `{self.command}`."
            )
        return places

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
        table = self._rows[self._found(examples)]
        keep, _ = shift_for_next_token(batch["labels"])
        aligned = torch.zeros_like(keep)
        for row, (flags, number) in enumerate(zip(*(table[n].to_pylist() for n in ("aligned", "row")), strict=True)):
            if len(flags) != keep[row].sum():
                raise ValueError(
                    f"Row {number} of the cache `{self.folder}` has {len(flags)} response tokens, and the student "
                    f"reads {keep[row].sum()}: take the `max_length` that the cache was made with."
                )
            aligned[row, keep[row]] = torch.tensor(flags, dtype=torch.bool)
        values = {}
        for name, dtype in (("token_ids", np.int32), ("log_probs", None)):
            flat = table[name].combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False)
            values[name] = torch.from_numpy(flat.astype(dtype or flat.dtype).reshape(-1, self.settings["top_k"]))
        return {"index": values["token_ids"], "log_probs": values["log_probs"], "aligned": aligned}

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
