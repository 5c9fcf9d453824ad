"""Plain float64 forms of the losses, written apart from the code that they judge."""

import math


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
    else:
        m = [beta * t + (1 - beta) * s for s, t in zip(ps, pt, strict=True)]
        value = beta * kl(pt, m) + (1 - beta) * kl(ps, m)
        gradient = [(1 - beta) * s * (math.log(s / mix) - kl(ps, m)) for s, mix in zip(ps, m, strict=True)]
    return value * temperature**2, [g * temperature for g in gradient]


def top_k(logits, k, temperature=1.0):
    log_probs, index = (logits / temperature).log_softmax(-1).topk(k)
    return index, log_probs
