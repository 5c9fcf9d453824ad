"""How far the student's distribution is from the teacher's: one function a divergence, found in one table."""

import torch
from torch.nn import functional as F

from llava_mod_hf.losses.rows import at_least_one, loss_dtype, shift_for_next_token


def _forward_kl(log_p_student, log_p_teacher, beta):
    return _expected(log_p_teacher, log_p_student)


def _reverse_kl(log_p_student, log_p_teacher, beta):
    return _expected(log_p_student, log_p_teacher)


def _soft_cross_entropy(log_p_student, log_p_teacher, beta):
    p = log_p_teacher.exp()
    return -(p * log_p_student.masked_fill(p == 0, 0)).sum(-1)


def _jsd(log_p_student, log_p_teacher, beta):
    mixture = (1 - beta) * log_p_student.exp() + beta * log_p_teacher.exp()
    # where both are 0 nothing is added, and the logarithm must not make a NaN of its gradient
    log_mixture = mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()
    return beta * _expected(log_p_teacher, log_mixture) + (1 - beta) * _expected(log_p_student, log_mixture)


def _expected(log_p, log_q):
    """Σ_v p [log p − log q]; a token with p = 0 contributes 0, where 0 · −inf would be NaN, as its gradient."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)


DIVERGENCES = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "soft_cross_entropy": _soft_cross_entropy,
}


def check_divergence(divergence, *, temperature=1.0, jsd_beta=0.5):
    """
    Raises:
        ValueError: if the divergence is unknown, the temperature not positive or `jsd_beta` not between 0 and 1.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"`divergence` is {divergence!r}: give one of {', '.join(DIVERGENCES)}.")
    if not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}: give a positive one.")
    if not 0 < jsd_beta < 1:
        raise ValueError(
            f"`jsd_beta` is {jsd_beta}: give one between 0 and 1, or take `forward_kl` or `reverse_kl` as divergence, "
            "which are what it tends to at either end."
        )


def divergence_rows(student_logits, teacher_logits, *, divergence="forward_kl", temperature=1.0, jsd_beta=0.5):
    """
    How far the student's distribution is from the teacher's, per row, in nats, times T².

        forward_kl = Σ_v p_T [log p_T − log p_S]                  (paper, eq. 6)
        reverse_kl = Σ_v p_S [log p_S − log p_T]
        jsd        = β KL(p_T ‖ m) + (1 − β) KL(p_S ‖ m),  m = β p_T + (1 − β) p_S
                     (generalised Jensen-Shannon divergence: Agarwal et al., 2023, arXiv 2306.13649, eq. 1)
        soft_cross_entropy = −Σ_v p_T log p_S                     (what the authors' code has for a KL)

    with p = softmax(logits / T). The factor T² keeps the gradient's size independent of the temperature (Hinton et
    al., 2015).

    Args:
        student_logits, teacher_logits (`torch.FloatTensor` of shape `(rows, vocabulary)`): any float type.
        divergence (`str`, *optional*, defaults to `"forward_kl"`, the paper's): of `DIVERGENCES`.
        temperature (`float`, *optional*, defaults to 1.0): T; the authors use none.
        jsd_beta (`float`, *optional*, defaults to 0.5): β, of `jsd` alone.

    Returns:
        `torch.FloatTensor` of shape `(rows,)`, float32 (float64 if the inputs are).
    """
    log_p_student, log_p_teacher = (
        _log_softmax(logits, loss_dtype(student_logits), temperature) for logits in (student_logits, teacher_logits)
    )
    return DIVERGENCES[divergence](log_p_student, log_p_teacher, jsd_beta) * temperature**2


def top_k_forward_kl(student_logits, index, log_probs, *, temperature=1.0):
    """
    Forward KL from a teacher of whom only the k most likely tokens are known, per row, in nats, times T².

        KL = T² (Σ_{v ∈ K} p_T(v) [log p_T(v) − log p_S(v)] + r_T [log r_T − log r_S]),   r = 1 − Σ_{v ∈ K} p(v)

    The remaining mass is one bucket, so that this is a divergence too: 0 for equal distributions, and never larger
    than the full one.

    Args:
        student_logits (`torch.FloatTensor` of shape `(rows, vocabulary)`).
        index, log_probs: as in [`TopKRows`].
        temperature (`float`, *optional*, defaults to 1.0): T, at which `log_probs` were taken.

    Returns:
        `torch.FloatTensor` of shape `(rows,)`, float32 (float64 if the logits are).
    """
    dtype = loss_dtype(student_logits)
    tiny = torch.finfo(dtype).tiny
    log_p_student = _log_softmax(student_logits, dtype, temperature)
    known = log_probs > -torch.inf
    index = torch.where(known, index, index[:, :1])  # a padded entry must not hide another token
    listed = torch.zeros_like(log_p_student, dtype=torch.bool).scatter_(-1, index, True)
    rest_student = log_p_student.exp().masked_fill(listed, 0).sum(-1).clamp(min=tiny)
    p_teacher = log_probs.to(dtype).exp()
    # rounding may leave a little less than nothing, or a little where every token is listed and nothing is left
    rest_teacher = (1 - p_teacher.sum(-1)).clamp(min=0).masked_fill(listed.all(-1), 0)
    gap = (log_probs.to(dtype) - log_p_student.gather(-1, index)).masked_fill(~known, 0)
    divergence = (p_teacher * gap).sum(-1) + torch.xlogy(rest_teacher, rest_teacher.clamp(min=tiny) / rest_student)
    return divergence * temperature**2


def mimic_loss(
    student_logits,
    teacher_logits,
    labels,
    *,
    divergence="forward_kl",
    temperature=1.0,
    jsd_beta=0.5,
    num_items=None,
):
    """
    Mimic distillation on the supervised response positions (paper, eq. 6).

        L = Σ_t D(p_T(·|t), p_S(·|t)) / N

    over the positions t that predict a supervised token. `MimicTrainer` computes the same without full logits, by
    [`~llava_mod_hf.losses.chunked_mimic.chunked_mimic_loss`].

    Args:
        student_logits, teacher_logits (`torch.FloatTensor` of shape `(batch, sequence, vocabulary)`).
        labels (`torch.LongTensor` of shape `(batch, sequence)`): unshifted, −100 ignored.
        divergence, temperature, jsd_beta (*optional*): D, as in [`divergence_rows`].
        num_items (`int` or `torch.Tensor`, *optional*):
            N, the supervised tokens of the whole optimiser step; by default those of this batch.

    Returns:
        `torch.FloatTensor`: a scalar; 0, with a gradient of 0, if nothing is supervised.

    Raises:
        ValueError: if the shapes do not fit, for example because the vocabularies differ, or if an option is unknown.
    """
    check_divergence(divergence, temperature=temperature, jsd_beta=jsd_beta)
    if student_logits.shape != teacher_logits.shape or student_logits.shape[:2] != labels.shape:
        raise ValueError(
            f"Student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)} and labels "
            f"{tuple(labels.shape)} do not fit: expected (batch, sequence, vocabulary) twice and (batch, sequence)."
        )
    keep, _ = shift_for_next_token(labels)
    rows = divergence_rows(
        student_logits[keep], teacher_logits[keep], divergence=divergence, temperature=temperature, jsd_beta=jsd_beta
    )
    return rows.sum() / at_least_one(keep.sum() if num_items is None else num_items)


def _log_softmax(logits, dtype, temperature):
    logits = logits.to(dtype)
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
