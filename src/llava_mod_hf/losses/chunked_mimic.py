"""
The mimic loss from hidden states and output heads: a `(rows, vocabulary)` tensor exists for one chunk of rows alone.

TRL's `trl.kernels.chunked_divergence` has the same aim and is not used here: it tiles the vocabulary, so that its
backward pass projects both models a second time, and it knows neither the LM term, which shares the student's
projection and softmax, nor a teacher of whom only the top k are known. The test compares the two.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_mod_hf.losses.divergences import check_divergence, divergence_rows, top_k_forward_kl
from llava_mod_hf.losses.rows import ProjectedRows, TopKRows, at_least_one

# Logits per block on a CPU: 4 MB in float32, which the some ten passes of a softmax and its gradient find in the cache.
BLOCK_LOGITS = 2**20


class MimicTerms(NamedTuple):
    """
    The loss and what it is made of.

    Args:
        loss (`torch.FloatTensor`): a scalar, the only one with a gradient.
        kl (`torch.FloatTensor` of shape `(teachers,)`): Σ over rows of each teacher's divergence, without its weight.
        lm (`torch.FloatTensor`): Σ over rows of the cross-entropy.
        correct (`torch.FloatTensor`): rows whose target is the student's most likely token.
        entropy (`torch.FloatTensor`): Σ over rows of the entropy of the student's distribution, in nats.
    """

    loss: Tensor
    kl: Tensor
    lm: Tensor
    correct: Tensor
    entropy: Tensor


class _Options(NamedTuple):
    divergence: str
    temperature: float
    jsd_beta: float
    kl_weights: tuple[float, ...]
    lm_weight: float
    shared_vocab_size: int | None
    targets_for_unaligned: bool
    items: int | Tensor
    rows_per_chunk: int
    with_gradient: bool


# parameters: the tensors of both sides, and every term's weight, as the formula has them
def chunked_mimic_loss(
    hidden,
    head,
    targets,
    teachers,
    *,
    divergence="forward_kl",
    temperature=1.0,
    jsd_beta=0.5,
    kl_weight=1.0,
    teacher_weights=None,
    lm_weight=0.0,
    num_items=None,
    shared_vocab_size=None,
    targets_for_unaligned=True,
    rows_per_chunk=256,
):
    """
    Mimic distillation on rows, a row being a position that predicts a supervised token (paper, eq. 6).

        L = Σ_rows (kl_weight · Σ_i w_i · D(p_Ti, p_S) + lm_weight · CE(target)) / N

    Gradients are computed in the forward pass, chunk by chunk, so that nothing is projected twice: two products with
    the heads, one for the gradient of the hidden states, and one for that of the head if it is trained.

    Args:
        hidden (`torch.FloatTensor` of shape `(rows, width)`): the student's last hidden states, any float type.
        head ([`~llava_mod_hf.losses.rows.Head`]): the student's.
        targets (`torch.LongTensor` of shape `(rows,)`): the supervised tokens.
        teachers (`list` of [`~llava_mod_hf.losses.rows.ProjectedRows`] or [`~llava_mod_hf.losses.rows.TopKRows`]):
            May be empty; may be on another device. A teacher whose `aligned` leaves out a row is represented there by
            the cross-entropy with the target.
        divergence, temperature, jsd_beta (*optional*):
            D, as in [`~llava_mod_hf.losses.divergences.divergence_rows`]; of top-k rows only `forward_kl` is known.
        kl_weight (`float`, *optional*, defaults to 1.0).
        teacher_weights (`list[float]`, *optional*): w_i; 1 / teachers each by default.
        lm_weight (`float`, *optional*, defaults to 0.0).
        num_items (`int` or `torch.Tensor`, *optional*):
            N, the supervised tokens of the whole optimiser step; by default those of this batch.
        shared_vocab_size (`int`, *optional*):
            D compares the first so many tokens, CE all of the student's; all by default.
        targets_for_unaligned (`bool`, *optional*, defaults to `True`):
            With `False` nothing takes the place of a teacher that leaves out a row.
        rows_per_chunk (`int`, *optional*, defaults to 256):
            Memory is two float32 tensors of `(rows_per_chunk, vocabulary)` beyond the gradients.

    Returns:
        [`MimicTerms`].

    Raises:
        ValueError: if numbers of rows, of teachers or vocabularies do not fit, or an option is unknown.
    """
    check_divergence(divergence, temperature=temperature, jsd_beta=jsd_beta)
    if teacher_weights is None:
        teacher_weights = [1 / len(teachers) for _ in teachers]
    _check_rows(hidden, head, targets, teachers, teacher_weights, shared_vocab_size)
    if divergence != "forward_kl" and any(isinstance(teacher, TopKRows) for teacher in teachers):
        raise ValueError(
            f"`divergence` is {divergence!r}, and a cached teacher has only its k most likely tokens, which serve "
            "`forward_kl` alone: take that, or a live teacher."
        )
    if rows_per_chunk < 1:
        raise ValueError(f"`rows_per_chunk` is {rows_per_chunk}: give at least 1.")
    options = _Options(
        divergence,
        temperature,
        jsd_beta,
        tuple(kl_weight * weight for weight in teacher_weights),
        lm_weight,
        shared_vocab_size,
        targets_for_unaligned,
        at_least_one(len(targets) if num_items is None else num_items),
        rows_per_chunk,
        torch.is_grad_enabled(),
    )
    return MimicTerms(*_ChunkedMimicLoss.apply(hidden, head.weight, head.bias, head, targets, teachers, options))


def _check_rows(hidden, head, targets, teachers, weights, shared_vocab_size):
    if len(weights) != len(teachers):
        raise ValueError(f"There are {len(teachers)} teachers and {len(weights)} `teacher_weights`: give one each.")
    if len(hidden) != len(targets):
        raise ValueError(f"There are {len(hidden)} rows of hidden states and {len(targets)} targets: give one each.")
    size = len(head.weight) if shared_vocab_size is None else shared_vocab_size
    for teacher in teachers:
        rows = len(hidden) if teacher.aligned is None else int(teacher.aligned.sum())
        if len(teacher[0]) != rows:
            raise ValueError(f"A teacher has {len(teacher[0])} rows where {rows} of the student's are aligned with it.")
        theirs = size if isinstance(teacher, TopKRows) else len(teacher.head.weight)
        if size > min(theirs, len(head.weight)):
            raise ValueError(
                f"The teacher's head has {theirs} tokens, the student's {len(head.weight)}, and {size} are to be "
                "compared: give the number that both have as `shared_vocab_size`."
            )
        if isinstance(teacher, TopKRows):
            _check_ids(teacher, size)


def _check_ids(rows, size):
    outside = rows.index[rows.log_probs > -torch.inf]
    outside = outside[(outside < 0) | (outside >= size)]
    if len(outside):
        raise ValueError(
            f"A teacher's most likely tokens have the id {outside[0]}, and the first {size} tokens are compared: its "
            "probabilities are over others, so give a teacher of those alone, or its number as `shared_vocab_size`."
        )


class _ChunkedMimicLoss(torch.autograd.Function):
    """`head` is passed as a whole, and its tensors again where autograd sees them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, targets, teachers, options):
        dtype = _compute_dtype(hidden)
        teachers = [_Teacher(rows, options, len(targets)) for rows in teachers]
        needs = [options.with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            sums, ctx.gradients = _sums_and_gradients(
                hidden.to(dtype),
                head._replace(weight=weight.to(dtype), bias=None if bias is None else bias.to(dtype)),
                targets,
                teachers,
                options,
                needs,
            )
        loss, *others = sums
        ctx.items = options.items
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*others)
        return loss / options.items, *others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError("The chunked mimic loss keeps no graph: call `backward` once per forward pass.")
        gradients, ctx.gradients = ctx.gradients, None
        factor = grad_loss / ctx.items  # at once: divided by N alone, a gradient in fp16 would be 0 before it is scaled
        scaled = [
            None if gradient is None else _scaled(gradient, factor, dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, *[None] * 4)


def _scaled(gradient, factor, dtype):
    """`factor · gradient` in `dtype`, rounded to it last; in place where it can be, as the head's is a large one."""
    return gradient.to(torch.promote_types(gradient.dtype, dtype)).mul_(factor).to(dtype)


def _compute_dtype(hidden):
    """The type in which the model's own head would project these hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _Teacher:
    """Rows of one teacher, and which of them belong to a chunk of the student's rows."""

    def __init__(self, rows, options, count):
        self.rows = rows
        self.options = options
        self.aligned = rows.aligned
        if isinstance(rows, ProjectedRows):
            size, dtype = options.shared_vocab_size, _compute_dtype(rows.hidden)
            self.hidden, self.weight = rows.hidden.to(dtype), rows.head.weight[:size].to(dtype)
            self.bias = None if rows.head.bias is None else rows.head.bias[:size].to(dtype)
        self.starts = range(count + 1)  # how many of the teacher's rows lie before each of the student's
        if self.aligned is not None:
            self.starts = [0, *self.aligned.cumsum(0).tolist()]

    def chunk(self, start, stop, device):
        """What is compared with rows `start` to `stop`: logits, or token ids and log-probabilities."""
        own = slice(self.starts[start], self.starts[stop])
        if isinstance(self.rows, TopKRows):
            return self.rows.index[own].to(device), self.rows.log_probs[own].to(device)
        return (self.rows.head.finish(F.linear(self.hidden[own], self.weight, self.bias)).to(device),)

    def divergence(self, logits, cross_entropy, chunk, chunk_start, start, stop):
        """Per row of the student's from `start` to `stop`, of which `chunk` begins at `chunk_start`."""
        first = self.starts[chunk_start]
        own = [part[self.starts[start] - first : self.starts[stop] - first] for part in chunk]
        logits = logits[:, : self.options.shared_vocab_size]
        aligned = None if self.aligned is None else self.aligned[start:stop].to(logits.device)
        if aligned is not None:
            logits = logits[aligned]
        if isinstance(self.rows, TopKRows):
            found = top_k_forward_kl(logits, *own, temperature=self.options.temperature)
        else:
            found = divergence_rows(
                logits,
                own[0],
                divergence=self.options.divergence,
                temperature=self.options.temperature,
                jsd_beta=self.options.jsd_beta,
            )
        if aligned is None:
            return found
        others = cross_entropy if self.options.targets_for_unaligned else torch.zeros_like(cross_entropy)
        return others.masked_scatter(aligned, found)


def _sums_and_gradients(hidden, head, targets, teachers, options, needs):
    """
    The sums of [`MimicTerms`], and the first one's gradients of hidden states, weight and bias where needed.

    Neither is divided by N. Those of fp16 are multiplied in float32, as their sums over rows may leave its range.
    """
    needs_hidden, needs_weight, needs_bias = needs
    zero = head.finish(hidden.new_zeros(()))
    sums = [zero.clone(), zero.new_zeros(len(teachers)), zero.clone(), zero.clone(), zero.clone()]
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype  # of the gradients' products
    weight = head.weight.to(dtype) if needs_hidden else None
    # summed over chunks in float32, whatever the head's type
    grad_hidden = torch.zeros_like(hidden, dtype=dtype) if needs_hidden else None
    grad_weight = None
    grad_bias = torch.zeros_like(head.bias, dtype=zero.dtype) if needs_bias else None
    for start in range(0, len(hidden), options.rows_per_chunk):
        stop = min(start + options.rows_per_chunk, len(hidden))
        rows = hidden[start:stop]
        projected = F.linear(rows, head.weight, head.bias).to(zero.dtype)  # (rows of the chunk, vocabulary)
        asked = [(teacher, teacher.chunk(start, stop, hidden.device)) for teacher in teachers]
        for block in _blocks(projected):
            bounds = start + block.start, start + block.stop
            terms = _block_terms(projected[block], head, targets, asked, start, bounds, options, needs)
            for total, term in zip(sums, terms, strict=True):
                total += term
        gradient = projected.to(dtype)  # the blocks have put it in the projection's place
        if needs_hidden:
            torch.mm(gradient, weight, out=grad_hidden[start:stop])
        if needs_weight:
            grad_weight = _add_product(grad_weight, gradient, rows.to(dtype))
        if needs_bias:
            grad_bias += projected.sum(0)
    if needs_weight and grad_weight is None:  # no rows
        grad_weight = torch.zeros_like(head.weight)
    return sums, (grad_hidden, grad_weight, grad_bias)


def _blocks(projected):
    """Slices of rows, small enough for a CPU's cache; elsewhere the whole chunk, for fewer and larger kernels."""
    rows, vocabulary = projected.shape
    size = max(1, BLOCK_LOGITS // vocabulary) if projected.device.type == "cpu" else rows
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _block_terms(projected, head, targets, asked, chunk_start, bounds, options, needs):
    """Terms of one block of rows; replaces `projected` by the gradient of the loss where one is needed."""
    with torch.set_grad_enabled(any(needs)):
        leaf = projected.detach().requires_grad_(any(needs))
        logits = head.finish(leaf)
        log_p = F.log_softmax(logits, -1)
        cross_entropy = F.nll_loss(log_p, targets[slice(*bounds)], reduction="none")
        kl = [teacher.divergence(logits, cross_entropy, chunk, chunk_start, *bounds).sum() for teacher, chunk in asked]
        lm = cross_entropy.sum()
        weighted = [weight * term for weight, term in zip(options.kl_weights, kl, strict=True)]
        if options.lm_weight or not asked:  # else its gradient is not worth a pass
            weighted.append(options.lm_weight * lm)
        loss = torch.stack(weighted).sum()
    with torch.no_grad():
        chosen = logits.gather(-1, targets[slice(*bounds), None]).squeeze(-1)
        correct = (chosen == logits.amax(-1)).sum()
        # a token that is excluded has 0 · −inf, which is NaN
        entropy = -log_p.exp().mul_(log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum()
        if any(needs):
            projected.copy_(torch.autograd.grad(loss, leaf)[0])
        return loss, torch.stack(kl) if kl else projected.new_zeros(0), lm, correct, entropy


def _add_product(total, gradient, rows):
    """`total + gradientᵀ · rows`; the first chunk's product is the total itself, and needs no memory of its own."""
    if total is None:
        return gradient.T @ rows
    if total.dtype == gradient.dtype == torch.promote_types(gradient.dtype, torch.float32):
        return total.addmm_(gradient.T, rows)
    return total.to(torch.promote_types(total.dtype, torch.float32)).add_(gradient.T @ rows)
