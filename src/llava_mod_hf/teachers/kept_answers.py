"""What a cache keeps of a teacher's distributions: their most likely tokens, or a sample of their tokens."""

import hashlib

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value
from torch.nn import functional as F

ROWS_AT_ONCE = 512  # of logits

MOST_SAMPLES = 2**16 - 1  # that a count can say


class TopK:
    """
    The k most likely tokens and their log-probabilities; for the loss, what is missing to 1 is one more bucket.

    Args:
        k (`int`): more than the vocabulary has are all of it.
        vocabulary (`int`): tokens that the distributions are over.
        dtype (`str`, *optional*, defaults to `"float16"`): of the log-probabilities.
    """

    def __init__(self, k, vocabulary, dtype="float16"):
        self.k, self.vocabulary, self.dtype = min(k, vocabulary), vocabulary, dtype

    def settings(self):
        """What says in a cache's settings that it has these."""
        return {"vocabulary": self.vocabulary, "top_k": self.k, "log_probs": self.dtype}

    def features(self):
        """Columns of the cache."""
        lists = {"token_ids": _id_type(self.vocabulary), "log_probs": self.dtype}
        return _features({name: List(Value(kind), length=self.k) for name, kind in lists.items()})

    def rows(self, keys, numbers, aligned, answer, temperature):
        """
        Rows of the cache.

        Args:
            keys (`list[str]`), numbers (`list[int]`): of the rows.
            aligned (`list[torch.BoolTensor]`): per row, for each response token whether the teacher speaks about it.
            answer ([`~llava_mod_hf.losses.rows.ProjectedRows`]): what it says, of all the rows, in order.
            temperature (`float`): T, of softmax(logits / T).

        Returns:
            `datasets.Dataset`.
        """
        index, log_probs = top_k_log_probs(answer, self.k, temperature)
        schema = self.features().arrow_schema
        lists = {}
        for name, values in (("token_ids", index), ("log_probs", log_probs)):
            kind = schema.field(name).type.value_type.value_type
            flat = pa.array(values.cpu().reshape(-1).numpy().astype(kind.to_pandas_dtype()))
            lists[name] = pa.FixedSizeListArray.from_arrays(flat, self.k)
        return _table(keys, numbers, aligned, lists, schema)

    def read(self, table):
        """
        What a loss is given of rows of the cache (`pyarrow.Table`).

        Returns:
            `tuple[torch.IntTensor, torch.FloatTensor]`: token ids and log-probabilities, `(aligned tokens, k)` each.
        """
        ids, log_probs = (
            table[name].combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, self.k)
            for name in ("token_ids", "log_probs")
        )
        return torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(log_probs.copy())


class Sample:
    """
    n tokens drawn from each distribution, as ids and how often each was drawn, c. For the loss the teacher is
    w(v) = c(v) / n: since E[w] = p and the gradient of the forward KL by the student's logits is p_S − w, it is that of
    the full distribution in the mean, which that of the k most likely tokens is not (Anshumann et al., 2025, arXiv
    2503.16870). The KL itself comes out larger, by what a sample has less entropy.

    The draws are systematic where the paper's are independent: (i + u) / n for i = 0 … n − 1, with one u in [0, 1) a
    token, looked up in the cumulated distribution. A token has floor(n p) or ceil(n p) draws, so the variance is less.

    Args:
        count (`int`): n.
        vocabulary (`int`): tokens that the distributions are over.
        seed (`int`): of the draws, which follow from it and the row's key.
    """

    def __init__(self, count, vocabulary, seed):
        self.count, self.vocabulary, self.seed = count, vocabulary, seed

    def settings(self):
        """As of [`TopK`]."""
        return {"vocabulary": self.vocabulary, "num_samples": self.count, "sampling seed": self.seed}

    def features(self):
        """As of [`TopK`]: lists of as many ids as were drawn."""
        lists = {"token_ids": _id_type(self.vocabulary), "counts": "uint8" if self.count < 2**8 else "uint16"}
        return _features({name: List(Value(kind)) for name, kind in lists.items()})

    def rows(self, keys, numbers, aligned, answer, temperature):
        """As of [`TopK`]."""
        uniforms = [self._uniforms(key, int(row.sum())) for key, row in zip(keys, aligned, strict=True)]
        drawn = systematic_draws(answer, self.count, temperature, torch.cat(uniforms)).cpu()
        first = torch.ones_like(drawn, dtype=torch.bool)  # of equal ones, which follow each other
        first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        places = torch.cat([first.reshape(-1).nonzero()[:, 0], torch.tensor([drawn.numel()])])
        values = {"token_ids": drawn[first], "counts": places.diff()}
        schema, offsets = self.features().arrow_schema, np.cumsum([0, *first.sum(1).tolist()])
        lists = {}
        for name, each in values.items():
            kind = schema.field(name).type.value_type.value_type
            flat = pa.array(each.numpy().astype(kind.to_pandas_dtype()))
            lists[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)
        return _table(keys, numbers, aligned, lists, schema)

    def _uniforms(self, key, count):
        digest = hashlib.sha256(f"{self.seed} {key}".encode()).hexdigest()
        generator = torch.Generator().manual_seed(int(digest[:15], 16))
        return torch.rand(count, generator=generator, dtype=torch.float64)

    def read(self, table):
        """As of [`TopK`]; a token has as many entries as the one with most of them, others padded with −inf."""
        ids, counts = (table[name].combine_chunks().flatten() for name in ("token_ids", "counts"))
        lengths = torch.from_numpy(ids.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64))
        known = torch.arange(int(lengths.max()) if len(lengths) else 1) < lengths[:, None]
        index = torch.zeros(known.shape, dtype=torch.int32)
        log_probs = torch.full(known.shape, -torch.inf)
        index[known] = torch.from_numpy(ids.flatten().to_numpy(zero_copy_only=False).astype(np.int32))
        drawn = torch.from_numpy(counts.flatten().to_numpy(zero_copy_only=False).astype(np.float32))
        log_probs[known] = (drawn / self.count).log()
        return index, log_probs


def kept_by(settings):
    """What a cache of these settings keeps: [`TopK`] or [`Sample`]."""
    if "num_samples" in settings:
        return Sample(settings["num_samples"], settings["vocabulary"], settings["sampling seed"])
    return TopK(settings["top_k"], settings["vocabulary"], settings["log_probs"])


def top_k_log_probs(rows, k, temperature):
    """
    The k most likely tokens of each row and their log-probabilities, of softmax(logits / T).

    Args:
        rows ([`~llava_mod_hf.losses.rows.ProjectedRows`]): what a live teacher says.
        k (`int`): at most the vocabulary.
        temperature (`float`): T.

    Returns:
        `tuple[torch.LongTensor, torch.FloatTensor]`: `(rows, k)` each, the most likely first.
    """
    found = [part.topk(min(k, part.shape[-1])) for part in _log_probs(rows, temperature)]
    if not found:
        return rows.hidden.new_zeros((0, k), dtype=torch.long), rows.hidden.new_zeros((0, k))
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


def systematic_draws(rows, count, temperature, uniforms):
    """
    Tokens drawn from softmax(logits / T), see [`Sample`].

    Args:
        rows, temperature: as in [`top_k_log_probs`].
        count (`int`): of draws a row.
        uniforms (`torch.DoubleTensor` of shape `(rows,)`): u, in [0, 1).

    Returns:
        `torch.LongTensor` of shape `(rows, count)`: ids, in their order.
    """
    found, start = [rows.hidden.new_zeros((0, count), dtype=torch.long)], 0
    for part in _log_probs(rows, temperature):
        cumulated = part.double().exp().cumsum(-1)
        u = uniforms[start : start + len(part)].to(part.device)
        points = (torch.arange(count, device=part.device) + u[:, None]) / count * cumulated[:, -1:]
        found.append(torch.searchsorted(cumulated, points, right=True).clamp(max=part.shape[-1] - 1))
        start += len(part)
    return torch.cat(found)


def _log_probs(rows, temperature):
    """Of some rows at a time."""
    head = rows.head
    for hidden in rows.hidden.split(ROWS_AT_ONCE) if len(rows.hidden) else ():
        logits = head.finish(F.linear(hidden, head.weight, head.bias))
        yield F.log_softmax(logits / temperature, dim=-1)


def _id_type(vocabulary):
    """Ids as small as the vocabulary allows."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


def _features(lists):
    """Columns of a cache; `lists` has what is kept of an aligned response token."""
    return Features(
        {
            "key": Value("string"),
            "row": Value("int64"),
            "aligned": List(Value("bool")),
            **{name: List(each) for name, each in lists.items()},
        }
    )


def _table(keys, numbers, aligned, lists, schema):
    """Rows of a cache; `lists` has an entry an aligned response token, of all the rows, in order."""
    offsets = pa.array(np.cumsum([0, *(int(row.sum()) for row in aligned)]), pa.int32())
    columns = [pa.array(keys), pa.array(numbers, pa.int64()), pa.array([row.tolist() for row in aligned])]
    columns += [pa.ListArray.from_arrays(offsets, values) for values in lists.values()]
    return Dataset(pa.table(dict(zip(schema.names, columns, strict=True))).cast(schema))
