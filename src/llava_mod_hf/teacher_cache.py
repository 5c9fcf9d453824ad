"""A teacher's answers, written once: what determines them, where each row is found, training from them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import yaml
from datasets import Dataset, Features, List, Value, load_dataset
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoConfig, AutoProcessor

from llava_mod_hf.embedded import resolve
from llava_mod_hf.losses import TopKRows, shift_for_next_token
from llava_mod_hf.shards import SHARDS_FILE, check_shards
from llava_mod_hf.teacher import content_hash, processor_parts

TEXT_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")
# of a model's config, what has no influence on its logits or is an option of its own
VOLATILE = {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}
SAMPLE = 16  # rows whose images are compared at the start; every row's are when it is read
ROWS_AT_ONCE = 512  # of logits


# --- what determines the answers ---


def weights_hash(folder):
    """
    A hash of a model's tensors, whatever files they are in.

    Args:
        folder (`Path`): with its safetensors.

    Returns:
        `str`: sixteen hexadecimal digits.

    Raises:
        ValueError: if there are none.
    """
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                tensor = file.get_tensor(key).contiguous()
                content = hashlib.blake2b(tensor.reshape(-1).view(torch.uint8).numpy(), digest_size=16).hexdigest()
                tensors[key] = [str(tensor.dtype), list(tensor.shape), content]
    if not tensors:
        raise ValueError(f"`{folder}` has no safetensors to tell its weights by: save it with `save_pretrained`.")
    return content_hash(tensors)


def _local(name):
    """Folder of a model on this machine, or `None`."""
    path = Path(resolve(name))
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError):
        return None


def cache_settings(teacher, processor, *, loss_on, dtype, quantization=None, autocast=None, trust_remote_code=False):
    """
    What determines a teacher's answers to a row, and which of the student's tokens they are for.

    Args:
        teacher (`str`): name of the teacher; what is not on this machine, since a cache stands for it, is left out.
        processor (`ProcessorMixin`): the student's.
        loss_on (`str`): which tokens are supervised, such as `"completion"`.
        dtype, quantization (`str`): of the teacher's weights in memory.
        autocast (`str`, *optional*): precision of mixed precision, such as `"bf16"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`).

    Returns:
        `dict[str, str]`: flat and plain, for `shards.yaml`.
    """
    parts = processor_parts(processor)
    settings = {
        "tokenizer": parts["tokenizer"],
        "chat template": parts["chat_template"],
        "loss on": loss_on,
        "teacher dtype": dtype,
        "teacher quantization": quantization or "none",
        "mixed precision": autocast or "no",
    }
    folder = _local(teacher)
    if folder is not None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        teacher_parts = processor_parts(AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code))
        settings["teacher weights"] = weights_hash(folder)
        settings["teacher config"] = content_hash(_without_volatile(config.to_dict()))
        settings |= {f"teacher {name.replace('_', ' ')}": value for name, value in teacher_parts.items()}
    return settings


def _without_volatile(value):
    if isinstance(value, dict):
        return {key: _without_volatile(part) for key, part in value.items() if key not in VOLATILE}
    return value


def check_settings(folder, expected):
    """
    Refuses a cache of another making.

    Args:
        folder (`str` or `Path`): of the cache.
        expected (`dict`): settings of this run; those that it leaves out are not compared.

    Returns:
        `dict`: the cache's settings.

    Raises:
        ValueError: if there is no cache, shards are missing, or a setting differs, which is named.
    """
    path = Path(folder) / SHARDS_FILE
    if not path.is_file():
        raise ValueError(f"`{folder}` has no `{SHARDS_FILE}`: make the cache with `llava-mod cache-teacher` first.")
    found = yaml.safe_load(path.read_text())
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(
                f"The cache `{folder}` was made with another `{name}`: {found.get(name)!r} there, {value!r} here. Take "
                "what it was made with, or make another cache."
            )
    return found


# --- rows ---


def row_text_key(row):
    """Sixteen hexadecimal digits of the words of a row."""
    return content_hash({name: row[name] for name in TEXT_COLUMNS if row.get(name) is not None})


def row_key(row):
    """
    What a row is found by, whatever its place: a hash of its words and one of its images.

    Args:
        row (`dict`): as the data set yields it, with `images` (PIL) and columns of TRL's formats.

    Returns:
        `str`: 33 characters.
    """
    digest = hashlib.blake2b(digest_size=8)
    for image in row.get("images") or []:
        digest.update(f"{image.size}".encode())
        digest.update(image.convert("RGB").tobytes())
    return f"{row_text_key(row)}-{digest.hexdigest()}"


def top_k_log_probs(rows, k, temperature):
    """
    The k most likely tokens of each row and their log-probabilities, of softmax(logits / T).

    Args:
        rows ([`~llava_mod_hf.losses.ProjectedRows`]): what a live teacher says.
        k (`int`): at most the vocabulary.
        temperature (`float`): T.

    Returns:
        `tuple[torch.LongTensor, torch.FloatTensor]`: `(rows, k)` each, the most likely first.
    """
    head, found = rows.head, []
    for hidden in rows.hidden.split(ROWS_AT_ONCE):
        logits = head.finish(F.linear(hidden, head.weight, head.bias))
        found.append(F.log_softmax(logits / temperature, dim=-1).topk(min(k, logits.shape[-1])))
    if not found:
        return rows.hidden.new_zeros((0, k), dtype=torch.long), rows.hidden.new_zeros((0, k))
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


def cache_features(k, vocab_size, dtype):
    """Columns of a cache: `k` numbers per aligned response token, ids as small as the vocabulary allows."""
    token = Value("uint16" if vocab_size <= 2**16 else "uint32")
    return Features(
        {
            "key": Value("string"),
            "row": Value("int64"),
            "aligned": List(Value("bool")),
            "token_ids": List(List(token, length=k)),
            "log_probs": List(List(Value(dtype), length=k)),
        }
    )


def cached_rows(keys, numbers, aligned, index, log_probs, features):
    """
    Rows of a cache.

    Args:
        keys (`list[str]`), numbers (`list[int]`): of the rows.
        aligned (`list[torch.BoolTensor]`): per row, for each response token whether the teacher speaks about it.
        index, log_probs (`torch.Tensor` of shape `(aligned tokens, k)`): of all the rows, in order.
        features (`datasets.Features`): as [`cache_features`] makes them.

    Returns:
        `datasets.Dataset`.
    """
    schema = features.arrow_schema
    offsets = pa.array(np.cumsum([0, *(int(row.sum()) for row in aligned)]), pa.int32())
    columns = [pa.array(keys), pa.array(numbers, pa.int64()), pa.array([row.tolist() for row in aligned])]
    for name, values in (("token_ids", index), ("log_probs", log_probs)):
        kind = schema.field(name).type
        flat = pa.array(values.reshape(-1).numpy().astype(kind.value_type.value_type.to_pandas_dtype()))
        inner = pa.FixedSizeListArray.from_arrays(flat, values.shape[-1])
        columns.append(pa.ListArray.from_arrays(offsets, inner))
    table = pa.table(dict(zip(schema.names, columns, strict=True))).cast(schema)
    return Dataset(table)


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
        As [`~llava_mod_hf.teacher.LiveTeacher.rows`], from what [`collate`] found.

        Returns:
            [`~llava_mod_hf.losses.TopKRows`].
        """
        keep, _ = shift_for_next_token(labels)
        aligned = own_inputs["aligned"][keep]
        return TopKRows(own_inputs["index"].long(), own_inputs["log_probs"].float(), aligned)
