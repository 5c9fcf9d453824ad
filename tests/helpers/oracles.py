"""Plain float64 forms of the losses, written apart from the code that they judge."""

import math

import torch


def softmax(values):
    largest = max(values)
    exponentials = [math.exp(value - largest) for value in values]
    return [exponential / sum(exponentials) for exponential in exponentials]


def explicit_divergence(name, student, teacher, temperature=1.0, beta=0.5):
    """Value and gradient with respect to the student's logits of one row, token by token, from the definitions."""
    ps, pt = (softmax([logit / temperature for logit in logits]) for logits in (student, teacher))
    kl = lambda p, q: sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))  # noqa: E731
    if name == "forward_kl":
        value, gradient = kl(pt, ps), [s - t for s, t in zip(ps, pt, strict=True)]
    elif name == "soft_cross_entropy":
        value = -sum(t * math.log(s) for s, t in zip(ps, pt, strict=True))
        gradient = [s - t for s, t in zip(ps, pt, strict=True)]
    elif name == "reverse_kl":
        value = kl(ps, pt)
        gradient = [s * (math.log(s / t) - value) for s, t in zip(ps, pt, strict=True)]
    elif name == "jsd":
        m = [beta * t + (1 - beta) * s for s, t in zip(ps, pt, strict=True)]
        value = beta * kl(pt, m) + (1 - beta) * kl(ps, m)
        gradient = [(1 - beta) * s * (math.log(s / mix) - kl(ps, m)) for s, mix in zip(ps, m, strict=True)]
    else:
        raise KeyError(f"no sum is written out for {name}")
    return value * temperature**2, [g * temperature for g in gradient]


def top_k(logits, k, temperature=1.0):
    log_probs, index = (logits / temperature).log_softmax(-1).topk(k)
    return index, log_probs


def _forward_kl(ps, pt, beta):
    return (pt * (pt / ps).log()).sum(-1), ps - pt


def _reverse_kl(ps, pt, beta):
    value = (ps * (ps / pt).log()).sum(-1)
    return value, ps * ((ps / pt).log() - value[:, None])


def _soft_cross_entropy(ps, pt, beta):
    return -(pt * ps.log()).sum(-1), ps - pt


def _jsd(ps, pt, beta):
    mixture = beta * pt + (1 - beta) * ps
    own = (ps * (ps / mixture).log()).sum(-1)
    value = beta * (pt * (pt / mixture).log()).sum(-1) + (1 - beta) * own
    return value, (1 - beta) * ps * ((ps / mixture).log() - own[:, None])


ROW_DIVERGENCES = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "soft_cross_entropy": _soft_cross_entropy,
    "jsd": _jsd,
}


def mimic_sums(name, hidden, weight, teacher_hidden, teacher_weight, *, temperature=1.0, beta=0.5):
    """
    Σ over rows of a divergence, and its gradients of hidden states and weight, in float64 and without autograd.

    For vocabularies for which `explicit_divergence`, token by token, would take too long; 64 rows at a time.
    """
    weight, teacher_weight = weight.double(), teacher_weight.double()
    total, grad_hidden, grad_weight = 0.0, [], torch.zeros_like(weight)
    for rows, teacher_rows in zip(hidden.double().split(64), teacher_hidden.double().split(64), strict=True):
        ps = (rows @ weight.T / temperature).softmax(-1)
        pt = (teacher_rows @ teacher_weight.T / temperature).softmax(-1)
        value, gradient = ROW_DIVERGENCES[name](ps, pt, beta)
        total += temperature**2 * value.sum().item()
        grad_hidden.append(temperature * gradient @ weight)
        grad_weight += temperature * gradient.T @ rows
    return total, torch.cat(grad_hidden), grad_weight


def router_aux_loss(router_logits, *, attention_mask):
    """
    Load balancing of the router (Switch Transformer, eq. 4): Σ over layers of E · Σ_e f_e · P_e, with gradient.

    f_e is the share of the unpadded tokens whose first choice is expert e, P_e the mean router probability of e.
    """
    total = 0.0
    for logits in router_logits:  # (batch · sequence, experts)
        logits = logits[attention_mask.reshape(-1).bool()].double()
        first = logits.argmax(-1)
        shares = torch.stack([(first == expert).double().mean() for expert in range(logits.shape[-1])])
        total = total + logits.shape[-1] * (shares * logits.softmax(-1).mean(0)).sum()
    return total
