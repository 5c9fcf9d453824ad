"""All the maths of the stages: tensors in, tensors out. Imports torch alone."""

import torch
from torch.nn import functional as F


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


def forward_kl(student_logits, teacher_logits, temperature=1.0):
    """
    Kullback-Leibler divergence from teacher to student, per row, in nats, times T² (paper, eq. 6).

        KL = T² Σ_v p_T(v) [log p_T(v) − log p_S(v)],   p = softmax(logits / T)

    The factor T² keeps the gradient's size independent of the temperature (Hinton et al., 2015).

    Args:
        student_logits, teacher_logits (`torch.FloatTensor` of shape `(rows, vocabulary)`): any float type.
        temperature (`float`, *optional*, defaults to 1.0): T; the authors use none.

    Returns:
        `torch.FloatTensor` of shape `(rows,)`, float32 (float64 if the inputs are).
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_p_student = F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    log_p_teacher = F.log_softmax(teacher_logits.to(dtype) / temperature, dim=-1)
    p_teacher = log_p_teacher.exp()
    # a token that the teacher excludes (logit −inf) contributes 0, where 0 · −inf would be NaN
    terms = torch.where(p_teacher > 0, p_teacher * (log_p_teacher - log_p_student), 0.0)
    return terms.sum(-1) * temperature**2


def mimic_loss(student_logits, teacher_logits, labels, *, temperature=1.0, num_items=None):
    """
    Mimic distillation on the supervised response positions (paper, eq. 6).

        L = Σ_t KL(p_T(·|t) ‖ p_S(·|t)) · T² / N

    over the positions t that predict a supervised token. `MimicTrainer` computes the same from logits that are
    projected at those positions only.

    Args:
        student_logits, teacher_logits (`torch.FloatTensor` of shape `(batch, sequence, vocabulary)`).
        labels (`torch.LongTensor` of shape `(batch, sequence)`): unshifted, −100 ignored.
        temperature (`float`, *optional*, defaults to 1.0).
        num_items (`int` or `torch.Tensor`, *optional*):
            N, the supervised tokens of the whole optimiser step; by default those of this batch.

    Returns:
        `torch.FloatTensor`: a scalar; 0, with a gradient of 0, if nothing is supervised.

    Raises:
        ValueError: if the shapes do not fit, for example because the vocabularies differ.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.shape[:2] != labels.shape:
        raise ValueError(
            f"Student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)} and labels "
            f"{tuple(labels.shape)} do not fit: expected (batch, sequence, vocabulary) twice and (batch, sequence)."
        )
    keep, _ = shift_for_next_token(labels)
    total = forward_kl(student_logits[keep], teacher_logits[keep], temperature).sum()
    return total / _at_least_one(keep.sum() if num_items is None else num_items)


def router_aux_loss(router_logits, *, num_experts, num_experts_per_tok, attention_mask=None):
    """
    Load balancing of the router as the authors train with it (Switch Transformer, eq. 4, as DeepSpeed computes it).

        L = Σ_layers E · Σ_e f_e · P_e

    f_e is the share of tokens whose first choice is expert e, P_e the mean router probability of e. About 1 per layer
    when balanced, and summed over layers; transformers' form pools the layers and counts all k choices, so that its
    value is about k. Not linear in the batch: its gradient depends on how a batch is split.

    Args:
        router_logits (`tuple[torch.FloatTensor]`): per layer `(batch * sequence, num_experts)`.
        num_experts (`int`): E.
        num_experts_per_tok (`int`): checked against `num_experts`; only the first choice counts.
        attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): padding, which does not count.

    Returns:
        `torch.FloatTensor`: a scalar.

    Raises:
        ValueError: if a layer's logits have another number of experts, or fewer than `num_experts_per_tok`.
    """
    total = router_logits[0].new_zeros(())
    for logits in router_logits:
        if logits.shape[-1] != num_experts or num_experts_per_tok > num_experts:
            raise ValueError(
                f"Router logits of shape {tuple(logits.shape)} do not fit {num_experts} experts, of which "
                f"{num_experts_per_tok} are chosen."
            )
        if attention_mask is not None:
            logits = logits[attention_mask.reshape(-1).bool()]
        probabilities = logits.float().softmax(-1)  # (tokens, experts)
        first_choice = F.one_hot(logits.argmax(-1), num_experts).to(probabilities.dtype)
        count = _at_least_one(len(logits))
        total = total + num_experts * (first_choice.sum(0) / count * (probabilities.sum(0) / count)).sum()
    return total


def _at_least_one(count):
    """A batch without any token has a loss of 0 / 1, not 0 / 0."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
