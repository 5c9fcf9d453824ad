"""Options of mimic distillation, apart from its trainer, so that `--help` need not import that."""

from dataclasses import dataclass, field

from trl import SFTConfig

from llava_mod_hf.losses.divergences import check_divergence
from llava_mod_hf.training.authors_behaviour import ReferenceCompat
from llava_mod_hf.training.batch_options import BatchOptions, check_batches
from llava_mod_hf.training.hub_options import HubOptions, check_hub
from llava_mod_hf.training.lora_options import LoraOptions, check_lora
from llava_mod_hf.training.router_balance import check_router_bias_update
from llava_mod_hf.training.trainable import check_train_modules
from llava_mod_hf.training.trainer_options import check_dependent_options, check_options, check_weights
from llava_mod_hf.training.validation_options import ValidationOptions, check_validation, choose_direction
from llava_mod_hf.training.vision_options import VisionOptions, check_vision_cache


@dataclass
class MimicConfig(BatchOptions, ValidationOptions, LoraOptions, HubOptions, VisionOptions, SFTConfig):
    """
    [`~trl.SFTConfig`] with the weights of the mimic loss.

        L = kl_weight · Σ_i w_i · D(teacher_i, student) + lm_weight · CE(labels) + router_aux_loss_coef · router aux

    The options of [`~llava_mod_hf.training.batch_options.BatchOptions`],
    [`~llava_mod_hf.training.lora_options.LoraOptions`],
    [`~llava_mod_hf.training.validation_options.ValidationOptions`],
    [`~llava_mod_hf.training.hub_options.HubOptions`] and
    [`~llava_mod_hf.training.vision_options.VisionOptions`] are options of it too.

    Args:
        divergence (`str`, *optional*, defaults to `"forward_kl"`):
            D: `forward_kl` (paper, eq. 6), `reverse_kl` or `jsd`, as in [`~llava_mod_hf.losses.divergence_rows`].
        temperature (`float`, *optional*, defaults to 1.0): of the divergence, which is multiplied by its square; the
            authors use none.
        jsd_beta (`float`, *optional*, defaults to 0.5): share of the teacher in the mixture of `jsd`.
        kl_weight (`float`, *optional*, defaults to 1.0).
        lm_weight (`float`, *optional*, defaults to 0.0): the paper has 0 dense-to-dense and 1 dense-to-sparse.
        teacher_weights (`list[float]`, *optional*): w_i, one per teacher; 1 / teachers each by default.
        rows_per_chunk (`int`, *optional*, defaults to 256):
            Response positions that are projected at a time; two `(rows_per_chunk, vocabulary)` float32 tensors.
        router_bias_update (`float`, *optional*, defaults to 0.0):
            What each step adds to the bias of an expert that was chosen less often than the mean, and takes from that
            of one chosen more often; the bias is of the choice alone, not of the gates (arXiv 2408.15664, which has
            0.001). With it, `router_aux_loss_coef` may be 0. Students keep what bias they have.
        on_policy_share (`float`, *optional*, defaults to 0.0):
            Share of the batches whose answers the student writes itself, for the teachers to judge. Such a batch has
            no labels to trust: its only loss is the divergence (Agarwal et al., 2023, arXiv 2306.13649).
        on_policy_max_new_tokens (`int`, *optional*, defaults to 128): longest answer of the student.
        share_vision_tower (`bool`, *optional*, defaults to `True`):
            Compute image features once where student and teacher have the same frozen encoder.
        shard_teacher (`bool`, *optional*, defaults to `False`):
            With FSDP2, shard the teacher's layers over the processes; else each process has a whole teacher.
        reference_compat (`list[str]`, *optional*):
            Behaviour of the authors' code that is left out otherwise, by the names of
            [`~llava_mod_hf.training.authors_behaviour.BEHAVIOURS`].
        reference_vocab_size (`int`, *optional*): the slice of `vocab_slice`, in tokens; the authors have 151936.
        train_modules (`list[str]`, *optional*):
            Parts that are trained, of `vision_tower`, `adaptor`, `language_model`, `ffn` (FFNs, experts and routers);
            by default the paper's: language model and adaptor of a dense student, FFNs and adaptor of a sparse one, or
            with peft the adapter alone. Parameters that were frozen before stay frozen.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    jsd_beta: float = 0.5
    kl_weight: float = 1.0
    lm_weight: float = 0.0
    teacher_weights: list[float] | None = field(default=None)
    rows_per_chunk: int = 256
    router_bias_update: float = 0.0
    on_policy_share: float = 0.0
    on_policy_max_new_tokens: int = 128
    share_vision_tower: bool = True
    shard_teacher: bool = False
    reference_compat: list[str] | None = field(default=None)
    reference_vocab_size: int | None = None
    train_modules: list[str] | None = field(default=None)

    def __post_init__(self):
        check_options(self, "mimic")
        choose_direction(self)
        super().__post_init__()
        check_dependent_options(self, "mimic")
        check_train_modules(self.train_modules)
        check_batches(self)
        check_lora(self)
        check_validation(self)
        check_hub(self)
        check_vision_cache(self)
        check_weights("`kl_weight`, `lm_weight`", [self.kl_weight, self.lm_weight])
        check_weights("`teacher_weights`", self.teacher_weights)
        check_divergence(self.divergence, temperature=self.temperature, jsd_beta=self.jsd_beta)
        ReferenceCompat(self.reference_compat, vocab_size=self.reference_vocab_size).check_divergence(self.divergence)
        check_router_bias_update(self.router_bias_update, use_peft=self.use_peft)
        if self.rows_per_chunk < 1 or self.on_policy_max_new_tokens < 1:
            raise ValueError(
                f"`rows_per_chunk` is {self.rows_per_chunk} and `on_policy_max_new_tokens` is "
                f"{self.on_policy_max_new_tokens}: give at least 1."
            )
        if not 0 <= self.on_policy_share <= 1:
            raise ValueError(f"`on_policy_share` is {self.on_policy_share}: give a share from 0 to 1.")
        if self.on_policy_share and not self.kl_weight:
            raise ValueError("`on_policy_share` needs a teacher that judges the answers, and `kl_weight` is 0.")
        # a batch of text alone does not use the adaptor, which DDP would take for an error
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True
