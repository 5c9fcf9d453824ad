"""A folder of what was said of rows before, which finds it by a row's words and images."""

import json
from pathlib import Path

import numpy as np
from datasets import load_dataset
from huggingface_hub import snapshot_download

from llava_mod_hf.data.parquet_shards import CHECKSUM, check_shards
from llava_mod_hf.fingerprints import TEXT_COLUMNS, row_key, row_text_key
from llava_mod_hf.hub_reading import told_when_the_hub_fails
from llava_mod_hf.teachers.answer_cache import check_settings, compare_settings

SAMPLE = 16  # rows whose images are compared at the start; every row's are when it is read


def _download(repo_id):
    patterns = ["*.parquet", "*.yaml", f"*{CHECKSUM}"]
    with told_when_the_hub_fails(repo_id):
        return Path(snapshot_download(repo_id, repo_type="dataset", allow_patterns=patterns))


class CachedRows:
    """
    What was said of rows before, and with which settings.

    Args:
        folder (`str`): a cache, or a data set of the Hub with one.
        command (`str`): that makes such a cache, for messages.
        expected (`dict`, *optional*): settings that it must have been made with, as for [`check_settings`].

    Raises:
        ValueError: if the cache is of another making, or not whole.
    """

    def __init__(self, folder, *, command, expected=None):
        self.folder, self.command = folder, command
        path = Path(folder) if Path(folder).is_dir() else _download(folder)
        self.settings = check_settings(path, expected or {}, command=command)
        check_shards(path)
        files = sorted(str(file) for file in path.rglob("train-*.parquet"))
        self._rows = load_dataset("parquet", data_files=files, split="train").with_format("arrow")
        keys = self._rows.select_columns("key")[:]["key"].to_numpy(zero_copy_only=False).astype("S33")
        self._order = np.argsort(keys)
        self._keys = keys[self._order]

    def check(self, expected, rows):
        """
        Refuses a cache that was made with other settings, or that lacks rows: compares all their words, and the images
        of a sample.

        Args:
            expected (`dict`): settings, as for [`check_settings`].
            rows (`datasets.Dataset` or `datasets.IterableDataset`): what is trained on; of a stream nothing is read,
                and a missing row is refused when it comes.

        Raises:
            ValueError: with the setting, or the number of missing rows and the first of them.
        """
        compare_settings(self.folder, self.settings, expected)
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

    def find(self, examples):
        """
        What the cache has of a batch.

        Args:
            examples (`list[dict]`): rows as the data set yields them.

        Returns:
            `pyarrow.Table`: the cache's rows, in the order of `examples`.

        Raises:
            ValueError: if a row is missing.
        """
        places = self._places([row_key(example) for example in examples])
        if -1 in places:
            first = examples[places.index(-1)]
            words = {name: first[name] for name in TEXT_COLUMNS if name in first}
            raise ValueError(
                f"The cache `{self.folder}` lacks {places.count(-1)} of {len(places)} rows of a batch, first the one "
                f"with {json.dumps(words, default=str)[:200]}: make it of this data, by `{self.command}`."
            )
        return self._rows[places]
