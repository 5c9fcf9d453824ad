"""Options of preference distillation, apart from its trainer, so that `--help` need not import that."""

import math
from dataclasses import dataclass, field

from trl import DPOConfig

from llava_mod_hf.losses.preference_losses import own_loss_names
from llava_mod_hf.training.hub_options import HubOptions, check_hub
from llava_mod_hf.training.lora_options import LoraOptions, check_lora
from llava_mod_hf.training.trainable import check_train_modules
from llava_mod_hf.training.trainer_options import check_dependent_options, check_options, check_weights
from llava_mod_hf.training.validation_options import ValidationOptions, check_validation, choose_direction
from llava_mod_hf.training.vision_options import VisionOptions, check_vision_cache

PARENT_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip

SMOOTHED_LOSSES = {"robust", "exo_pair", "aot", "aot_unpaired"}

REFERENCES = ("teacher", "self")


@dataclass
class PreferenceConfig(ValidationOptions, LoraOptions, HubOptions, VisionOptions, DPOConfig):
    """
    [`~trl.DPOConfig`] with the teacher as reference; by default `sigmoid` (DPO) with β = 0.1, as in the paper's first
    version.

    The options of [`~llava_mod_hf.training.lora_options.LoraOptions`], of
    [`~llava_mod_hf.training.validation_options.ValidationOptions`], of
    [`~llava_mod_hf.training.hub_options.HubOptions`] and of
    [`~llava_mod_hf.training.vision_options.VisionOptions`] are options of it too.

    Args:
        loss_type (`list[str]`, *optional*, defaults to `["sigmoid"]`):
            The parent's losses, such as `sigmoid`, `ipo`, `hinge` and `sft`, and `kto_pair`, `margin` and what
            [`~llava_mod_hf.losses.register_preference_loss`] adds; several of them with `loss_weights`.
            Log-probabilities are summed over the response; `ipo` and names that end with `_norm` average them.
        reference (`str`, *optional*, defaults to `"teacher"`):
            `"teacher"`, or `"self"`: the student as it was, a frozen copy or, with peft, the one without the adapter.
        kto_reference_compat (`bool`, *optional*, defaults to `False`):
            `kto_pair` as the authors train it: KL terms of each process's micro-batch alone, not detached.
        train_modules (`list[str]`, *optional*):
            Parts that are trained, of `vision_tower`, `adaptor`, `language_model`, `ffn` (FFNs, experts and routers);
            by default as in [`~llava_mod_hf.MimicConfig`]. Parameters that were frozen before stay frozen.
        share_prefix (`bool`, *optional*, defaults to `True`):
            Compute images and prompt of a pair once, not once for each response, in the student and the reference:
            the same loss and gradients, in less time and memory. Where a model cannot (flash attention, another family
            than LLaVA), a sentence says so, and its pairs are two rows.
    """

    reference: str = "teacher"
    kto_reference_compat: bool = False
    train_modules: list[str] | None = field(default=None)
    share_prefix: bool = True

    def __post_init__(self):
        check_options(self, "prefer")
        choose_direction(self)
        super().__post_init__()
        check_train_modules(self.train_modules)
        check_lora(self)
        check_validation(self)
        check_hub(self)
        check_vision_cache(self)
        self._check_choices()
        check_dependent_options(self, "prefer")
        check_weights("`loss_weights`", self.loss_weights, count=len(self.loss_type))
        own = [name for name in self.loss_type if name in own_loss_names()]
        if own and (self.ld_alpha is not None or self.use_weighting or self.f_divergence_type != "reverse_kl"):
            raise ValueError(
                f"`{own[0]}` takes plain log-ratios: leave out `ld_alpha` ({self.ld_alpha}), `use_weighting` "
                f"({self.use_weighting}) and `f_divergence_type` ({self.f_divergence_type})."
            )
        if self.use_weighting and "sft" in self.loss_type:
            raise ValueError("`use_weighting` weighs pairs, and TRL's `sft` has one figure for all: leave one out.")
        if self.kto_reference_compat and not any(name.startswith("kto") for name in own):
            raise ValueError(f"`kto_reference_compat` changes `kto_pair` alone, and `loss_type` is {self.loss_type}.")
        if self.label_smoothing and not SMOOTHED_LOSSES & set(self.loss_type):
            raise ValueError(
                f"`label_smoothing` is {self.label_smoothing}, which {self.loss_type} does not read: give one of "
                f"{', '.join(sorted(SMOOTHED_LOSSES))} as `loss_type` (`robust` is `sigmoid` with smoothing)."
            )
        if self.sync_ref_model and self.reference != "self":
            raise ValueError(
                '`sync_ref_model` moves the reference towards the student: give `reference="self"` with it.'
            )
        if "selective" in (self.gradient_checkpointing_kwargs or {}):
            raise ValueError(
                "`gradient_checkpointing_kwargs` has `selective`, which TRL's DPO does not know: leave it out."
            )
        if not 0 < self.beta < math.inf:
            raise ValueError(f"`beta` is {self.beta}: give a positive one.")

    def _check_choices(self):
        if self.reference not in REFERENCES:
            raise ValueError(f"`reference` is `{self.reference}`: give one of {', '.join(REFERENCES)}.")
        if not self.loss_type:
            raise ValueError(f"`loss_type` is {self.loss_type}: give one loss or more, or leave it out for `sigmoid`.")
        known = (*own_loss_names(), *PARENT_LOSSES)
        unknown = [name for name in self.loss_type if name not in known]
        if unknown:
            raise ValueError(f"There is no `loss_type` `{unknown[0]}`: give one of {', '.join(known)}.")
        twice = [name for name in self.loss_type if known.count(name) > 1]
        if twice:
            raise ValueError(f"`loss_type` `{twice[0]}` is TRL's and one that was added: give that another name.")
