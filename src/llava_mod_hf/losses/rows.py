"""Rows of a loss: positions that predict a supervised token, and what a head or a teacher says of them."""

from typing import NamedTuple

import torch
from torch import Tensor


def shift_for_next_token(labels):
    """
    Which positions predict a supervised token, and which token that is: the one place where labels are shifted.

    The logits at position `i` predict the token at `i + 1`.

    Args:
        labels (`torch.LongTensor` of shape `(batch, sequence)`): unshifted, −100 where nothing is supervised.

    Returns:
        `tuple`: boolean mask of the predicting positions `(batch, sequence)`, and their targets `(positions,)`.
    """
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != -100
    return keep, labels[:, 1:][keep[:, :-1]]


class Head(NamedTuple):
    """
    How hidden states become logits: `softcap · tanh(scale · (h Wᵀ + b) / softcap)`, as the family has it.

    Args:
        weight (`torch.FloatTensor` of shape `(vocabulary, width)`).
        bias (`torch.FloatTensor` of shape `(vocabulary,)`, *optional*).
        softcap (`float`, *optional*): `final_logit_softcapping` of the family.
        scale (`float`, *optional*, defaults to 1.0): before the softcap.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def finish(self, projected):
        """Logits from `h Wᵀ + b`, in float32 (float64 if that is)."""
        logits = projected.to(loss_dtype(projected))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class ProjectedRows(NamedTuple):
    """
    What a live teacher says of the student's rows: hidden states, which are projected chunk by chunk.

    Args:
        hidden (`torch.FloatTensor` of shape `(aligned rows, width)`).
        head ([`Head`]): the teacher's, cut to the vocabulary that it shares with the student.
        aligned (`torch.BoolTensor` of shape `(rows,)`, *optional*):
            Which of the student's rows the teacher speaks about; all without it.
    """

    hidden: Tensor
    head: Head
    aligned: Tensor | None = None

    def first(self, count):
        """What is said of the student's first `count` rows."""
        entries, aligned = _first(self.aligned, count)
        return ProjectedRows(self.hidden[:entries], self.head, aligned)


class TopKRows(NamedTuple):
    """
    What a cached teacher says of the student's rows.

    Args:
        index (`torch.LongTensor` of shape `(aligned rows, k)`): token ids.
        log_probs (`torch.FloatTensor` of shape `(aligned rows, k)`):
            At the temperature of the loss; −inf in padded entries. What is missing to 1 is one more bucket.
        aligned (`torch.BoolTensor` of shape `(rows,)`, *optional*): as in [`ProjectedRows`].
    """

    index: Tensor  # type: ignore[assignment]  # a tuple has a method of this name, which nobody calls here
    log_probs: Tensor
    aligned: Tensor | None = None

    def first(self, count):
        """As of [`ProjectedRows`]."""
        entries, aligned = _first(self.aligned, count)
        return TopKRows(self.index[:entries], self.log_probs[:entries], aligned)


def _first(aligned, count):
    """How many of a teacher's entries lie in the student's first `count` rows, and which rows they are."""
    if aligned is None:
        return count, None
    return int(aligned[:count].sum()), aligned[:count]


def at_least_one(count):
    """A batch without any token has a loss of 0 / 1, not 0 / 0."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)


def loss_dtype(logits):
    """Softmax and loss are computed in float32, in float64 if the logits are."""
    return torch.promote_types(logits.dtype, torch.float32)
