"""The maths of the stages: tensors in, tensors out; imports torch alone."""

from llava_mod_hf.losses.chunked_mimic import chunked_mimic_loss
from llava_mod_hf.losses.divergences import divergence_rows, mimic_loss, top_k_forward_kl
from llava_mod_hf.losses.preference_losses import kto_pair_loss, margin_loss, register_preference_loss
from llava_mod_hf.losses.rows import Head, ProjectedRows, TopKRows, shift_for_next_token

__all__ = [
    "Head",
    "ProjectedRows",
    "TopKRows",
    "chunked_mimic_loss",
    "divergence_rows",
    "kto_pair_loss",
    "margin_loss",
    "mimic_loss",
    "register_preference_loss",
    "shift_for_next_token",
    "top_k_forward_kl",
]
