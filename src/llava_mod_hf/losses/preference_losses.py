"""Losses on pairs of a chosen and a rejected response."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Pairs(NamedTuple):
    """
    What a preference loss is computed from: log-probabilities of responses, summed or, of a loss named `…_norm`,
    averaged over their tokens.

    Args:
        student_chosen, student_rejected, reference_chosen, reference_rejected
            (`torch.FloatTensor` of shape `(pairs,)`): in nats; those of the reference carry no gradient.
        gather (`Callable[[torch.Tensor], torch.Tensor]`): the same numbers of all processes, without a gradient.
        log (`Callable[[str, float], None]`): notes a figure, whose mean is logged.
        as_authors (`bool`): the option `kto_reference_compat`.
    """

    student_chosen: torch.Tensor
    student_rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    gather: Callable = lambda numbers: numbers
    log: Callable = lambda name, value: None
    as_authors: bool = False


def _kto_pair(pairs, beta):
    chosen = pairs.student_chosen - pairs.reference_chosen
    rejected = pairs.student_rejected - pairs.reference_rejected
    seen = (chosen.detach(), rejected.detach())
    seen = seen if pairs.as_authors else tuple(pairs.gather(ratios) for ratios in seen)
    for side, ratios in zip(("chosen", "rejected"), seen, strict=True):
        estimate = ratios.mean()
        pairs.log(f"kto/kl_{side}", estimate.clamp(min=0).item())
        pairs.log(f"kto/clamped_{side}", float(estimate <= 0))
    return kto_pair_loss(chosen, rejected, beta=beta, all_logratios=seen, reference_compat=pairs.as_authors)


def _margin(pairs, beta):
    student = pairs.student_chosen - pairs.student_rejected
    return margin_loss(student, pairs.reference_chosen - pairs.reference_rejected, beta=beta)


# `loss_type` → (pairs, beta) → a scalar; each is known as `NAME_norm` too, of log-probabilities per token
PREFERENCE_LOSSES: dict[str, Callable] = {"kto_pair": _kto_pair, "margin": _margin}


def register_preference_loss(name, function):
    """
    Adds a loss, which `loss_type` then takes as `name` and as `name_norm`.

    Args:
        name (`str`): of the loss; none of TRL's.
        function (`Callable[[Pairs, float], torch.Tensor]`): pairs and β → a scalar, a mean over the pairs.

    Raises:
        ValueError: if there is one of that name already, or it ends with `_norm`.
    """
    if name in PREFERENCE_LOSSES or name.endswith("_norm"):
        raise ValueError(
            f"A preference loss `{name}` cannot be added: {', '.join(PREFERENCE_LOSSES)} are there, and `_norm` at the "
            "end stands for log-probabilities per token. Give another name."
        )
    PREFERENCE_LOSSES[name] = function


def own_loss_names():
    """`tuple[str]`: what `loss_type` takes beside TRL's losses."""
    return tuple(f"{name}{ending}" for name in PREFERENCE_LOSSES for ending in ("", "_norm"))


def kto_pair_loss(chosen_logratios, rejected_logratios, *, beta, all_logratios=None, reference_compat=False):
    """
    KTO on pairs: each response against the mean of the other kind (paper's ICLR version; its code's `kto_pair`).

        L = mean over pairs of ½ [1 − σ(β(c − KL_r))] + ½ [1 − σ(β(KL_c − r))],   KL_x = max(0, mean of x)

    with c = log π_S(y⁺) − log π_T(y⁺), and r the same for y⁻. The two KL terms estimate how far the student is from its
    reference. They carry no gradient and rest on as many pairs as can be had (Ethayarajh et al., 2024, section 4.1).

    Args:
        chosen_logratios, rejected_logratios (`torch.FloatTensor` of shape `(pairs,)`): c and r, in nats.
        beta (`float`): β, larger is nearer to the reference.
        all_logratios (`tuple[torch.FloatTensor, torch.FloatTensor]`, *optional*):
            c and r of all processes, which the KL terms are estimated from; by default the given ones.
        reference_compat (`bool`, *optional*, defaults to `False`):
            As the authors train it: KL terms of the given pairs alone, through which the gradient flows. With one pair
            and positive log-ratios this is 1 − σ(β(c − r)), which is no longer KTO.

    Returns:
        `torch.FloatTensor`: a scalar, float32 (float64 if the inputs are).

    Raises:
        ValueError: if the two are not of one dimension and one length, or empty.
    """
    chosen, rejected = _pairs(chosen_logratios, rejected_logratios)
    if reference_compat:
        kl_chosen, kl_rejected = (ratios.mean().clamp(min=0) for ratios in (chosen, rejected))
    else:
        kl_chosen, kl_rejected = (
            ratios.detach().to(chosen.dtype).mean().clamp(min=0) for ratios in all_logratios or (chosen, rejected)
        )
    # 1 − σ(x) is σ(−x), without cancellation
    towards = torch.sigmoid(-beta * (chosen - kl_rejected))
    away = torch.sigmoid(-beta * (kl_chosen - rejected))
    return (towards + away).mean() / 2


def margin_loss(student_margins, teacher_margins, *, beta):
    """
    Hinge on the preference margin: a pair counts while the student prefers its chosen response less than the teacher.

        L = β · mean over pairs of max(0, m_T − m_S),   m = log π(y⁺) − log π(y⁻)

    m_S − m_T is c − r of DPO, whose reward margin is β times that. The hinge is thus at a reward margin of 0, where
    TRL's `hinge` has its own at 1, and β is the slope: the steepest that `sigmoid` reaches, so that mixtures of the two
    weigh alike. Where the margins are equal the gradient is 0: a student that is its own reference learns nothing.

    Args:
        student_margins, teacher_margins (`torch.FloatTensor` of shape `(pairs,)`): m_S and m_T, in nats.
        beta (`float`): β.

    Returns:
        `torch.FloatTensor`: a scalar, float32 (float64 if the inputs are).

    Raises:
        ValueError: if the two are not of one dimension and one length, or empty.
    """
    student, teacher = _pairs(student_margins, teacher_margins)
    return beta * (teacher - student).relu().mean()


def response_sums(log_probs, mask):
    """
    The log-probability of each response, and of its tail: the tokens past the length of its pair's shorter response.

    Args:
        log_probs (`torch.FloatTensor` of shape `(chosen and rejected, sequence)`):
            Of tokens; the first half of the rows are the chosen responses of the pairs, the second the rejected.
        mask (`torch.Tensor` of that shape): 1 where a token is of the response, where alone `log_probs` is not 0.

    Returns:
        `tuple[torch.FloatTensor, torch.FloatTensor]`: `(chosen and rejected,)` each, in nats.
    """
    shorter = mask.sum(1).reshape(2, -1).amin(0).repeat(2)
    tail = mask.cumsum(1) > shorter[:, None]
    return log_probs.sum(1), (log_probs * tail).sum(1)


def without_tail(sums, tails, ld_alpha):
    """
    LD-DPO's log-probability of a response (Liu et al., 2024, arXiv 2409.06411): of its tail, α times.

    Args:
        sums, tails (`torch.FloatTensor`): as [`response_sums`] returns them.
        ld_alpha (`float` or `None`): α; `None` for the whole.

    Returns:
        `torch.FloatTensor`.
    """
    return sums if ld_alpha is None else sums - (1 - ld_alpha) * tails


def _pairs(first, second):
    """Two numbers per pair, in at least float32."""
    if first.shape != second.shape or first.dim() != 1 or len(first) == 0:
        raise ValueError(
            f"Preference losses take two tensors with one number per pair, and got shapes {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return first.to(dtype), second.to(dtype)
