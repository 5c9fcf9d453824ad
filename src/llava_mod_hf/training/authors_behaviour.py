"""What the authors' code does otherwise, by name, for those who want to reproduce it (docs/divergences.md)."""

import torch
from torch.nn import functional as F

from llava_mod_hf.model.moe_llava_mod import LlavaModTopKRouter

# shufangxun/LLaVA-MoD at 481ca57
BEHAVIOURS = {
    "unshifted_mask": "unshifted logits are masked by unshifted labels, so that the first response token is never "
    "distilled and the position after the last one is (`align_trainer.py`, `compute_align_loss`)",
    "soft_cross_entropy": "cross-entropy with the teacher's distribution under the name of a KL: the same gradient, "
    "and not 0 when student and teacher agree (`align_trainer.py`)",
    "router_aux_twice": "the router aux is added inside the LM loss and once more beside it (`kd_lm`)",
    "vocab_slice": "the divergence compares a fixed number of tokens, `reference_vocab_size`; larger vocabularies are "
    "cut in silence",
    "gumbel_second_expert": "Gumbel noise picks the second expert, in evaluation too (DeepSpeed's top-2 gating)",
}


class ReferenceCompat:
    """
    The named behaviours as a trainer asks for them; without any, each answer is what the trainer does anyway.

    Args:
        names (`list[str]`, *optional*): of `BEHAVIOURS`.
        vocab_size (`int`, *optional*): of `vocab_slice`, and given with it alone.

    Raises:
        ValueError: if a name is unknown, or `vocab_slice` and its size are not given together.
    """

    def __init__(self, names=None, *, vocab_size=None):
        self.names = set(names or ())
        unknown = sorted(self.names - set(BEHAVIOURS))
        if unknown:
            raise ValueError(f"`reference_compat` has {unknown[0]!r}: give some of {', '.join(BEHAVIOURS)}.")
        if ("vocab_slice" in self.names) != (vocab_size is not None) or (vocab_size is not None and vocab_size < 1):
            raise ValueError(
                f"`reference_vocab_size` is {vocab_size}, and `reference_compat` is {sorted(self.names)}: "
                "`vocab_slice` goes with its size, of at least 1 token, and the other way round."
            )
        self.vocab_size = vocab_size
        self.aux_factor = 2 if "router_aux_twice" in self.names else 1

    def check_divergence(self, divergence):
        """
        Raises:
            ValueError: if somebody chose a divergence that would not be taken.
        """
        if "soft_cross_entropy" in self.names and divergence != "forward_kl":
            raise ValueError(
                f"`divergence` is {divergence!r}, which does nothing beside `reference_compat: [soft_cross_entropy]`, "
                "the authors' form of `forward_kl`: leave one out."
            )

    def divergence(self, divergence):
        """`str`: the name that [`~llava_mod_hf.losses.divergences.divergence_rows`] is given."""
        return "soft_cross_entropy" if "soft_cross_entropy" in self.names else divergence

    def shared_vocab_size(self, size):
        """`int`: how many of the `size` shared tokens are compared."""
        return size if self.vocab_size is None else min(self.vocab_size, size)

    def mimic_positions(self, inputs, labels):
        """
        Model inputs, labels of the LM term, and labels whose shifted positions the divergence is taken at.

        The position after a sequence's last token is one that a shift cannot name: the batch gets a masked token.
        """
        if "unshifted_mask" not in self.names:
            return inputs, labels, labels
        inputs = {
            name: F.pad(value, (0, 1)) if name in ("input_ids", "attention_mask") else value
            for name, value in inputs.items()
        }
        return inputs, F.pad(labels, (0, 1), value=-100), F.pad(labels, (1, 0), value=-100)

    def prepare(self, student, teachers):
        """
        Checks the teachers, and gives the student's routers their noise.

        Raises:
            ValueError: if a teacher's positions cannot be shifted with the student's.
        """
        if "unshifted_mask" in self.names and any(getattr(t, "collator", True) is not None for t in teachers):
            raise ValueError(
                "`unshifted_mask` needs teachers that read the student's own tokens: live, same processor."
            )
        if "gumbel_second_expert" in self.names:
            add_gumbel_second_expert(student)


def add_gumbel_second_expert(model):
    """
    Lets noise pick each token's second expert, in training and in evaluation.

        first = argmax z,   second = argmax_{e ≠ first} (z_e + g_e),   g_e ~ Gumbel(0, 1)

    The two gates are the softmax of z without noise, renormalised. z are a token's router logits.

    Args:
        model (`LlavaModForConditionalGeneration`): top-2, changed in place.

    Returns:
        `list`: handles of the hooks, whose `remove` ends it.

    Raises:
        ValueError: if the model is dense or not top-2.
    """
    routers = [module for module in model.modules() if _is_router(module)]
    if not routers or any(router.top_k != 2 for router in routers):
        raise ValueError(
            f"`gumbel_second_expert` is about top-2 routing, and this model has {len(routers)} routers with k of "
            f"{sorted({router.top_k for router in routers})}."
        )
    if any(getattr(router, "e_score_correction_bias", None) is not None for router in routers):
        raise ValueError(
            "`gumbel_second_expert` chooses by the probabilities alone, and this model's routers have a bias for the "
            "choice: leave it out, and `router_bias_update` too."
        )
    return [router.register_forward_hook(_with_gumbel_second) for router in routers]


def _is_router(module):
    # by name too: the class of a model that comes with its own code is another object
    return isinstance(module, LlavaModTopKRouter) or type(module).__name__ == LlavaModTopKRouter.__name__


def _with_gumbel_second(router, args, output):
    logits, weights, _ = output
    first = logits.argmax(-1, keepdim=True)
    noise = -torch.empty_like(logits).exponential_().log()
    second = (logits + noise).scatter(-1, first, -torch.inf).argmax(-1, keepdim=True)
    index = torch.cat([first, second], -1)
    gates = logits.softmax(-1).gather(-1, index)
    return logits, (gates / gates.sum(-1, keepdim=True)).to(weights.dtype), index
