"""Mimic distillation: the student learns the teacher's distribution over the response tokens (paper, section 3.2)."""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer
from trl.models import prepare_deepspeed, prepare_fsdp

from llava_mod_hf.losses import forward_kl, router_aux_loss, shift_for_next_token
from llava_mod_hf.teacher import check_teacher


@dataclass
class MimicConfig(SFTConfig):
    """
    [`~trl.SFTConfig`] with the weights of the mimic loss.

        L = kl_weight · KL(teacher ‖ student) + lm_weight · CE(labels) + router_aux_loss_coef · router aux

    Args:
        temperature (`float`, *optional*, defaults to 1.0): of the divergence; the authors use none.
        kl_weight (`float`, *optional*, defaults to 1.0).
        lm_weight (`float`, *optional*, defaults to 0.0): the paper has 0 dense-to-dense and 1 dense-to-sparse.
        train_modules (`list[str]`, *optional*):
            Parts that are trained, of `vision_tower`, `adaptor`, `language_model`, `ffn` (FFNs, experts and routers);
            by default the paper's: language model and adaptor of a dense student, FFNs and adaptor of a sparse one.
    """

    temperature: float = 1.0
    kl_weight: float = 1.0
    lm_weight: float = 0.0
    train_modules: list[str] | None = field(default=None)

    def __post_init__(self):
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"`temperature` is {self.temperature}: give a positive one.")
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise ValueError(
                f"Mimic distillation has its own loss: leave out `loss_type` ({self.loss_type}) and "
                f"`label_smoothing_factor` ({self.label_smoothing_factor})."
            )


class MimicTrainer(SFTTrainer):
    """
    [`~trl.SFTTrainer`] whose loss is that of [`MimicConfig`], on the supervised positions only.

    Both models project those positions alone, so that no `(tokens, vocabulary)` tensor is built. KL and LM terms are
    divided by the supervised tokens of the whole optimiser step, over accumulation steps and processes; the router aux
    is averaged over them, and is not linear: its gradient depends on the split.

    Args:
        model: the student, as in the parent.
        teacher_model (`PreTrainedModel` or `None`):
            Reads the same token ids and pixel values; is not trained. None is needed with `kl_weight=0`.
        teacher_processor (`ProcessorMixin`, *optional*): only to check that the tokenizers agree.
        args (`MimicConfig`, *optional*).
        kwargs: as in the parent.

    Raises:
        ValueError: if the teacher does not fit the student.
    """

    _tag_names = ["llava-mod", "mimic"]
    _name = "LLaVA-MoD mimic distillation"

    def __init__(self, model, teacher_model, args=None, *, processing_class=None, teacher_processor=None, **kwargs):
        args = args or MimicConfig()
        super().__init__(model, args=args, processing_class=processing_class, **kwargs)
        self.teacher_model = None
        if teacher_model is not None:
            check_teacher(self.model, teacher_model, self.processing_class, teacher_processor)
            self.teacher_model = self._prepare_teacher(teacher_model)
        elif args.kl_weight:
            raise ValueError(f"`kl_weight` is {args.kl_weight}, and there is no `teacher_model`: give one, or 0.")
        self._sums = {"train": defaultdict(float), "eval": defaultdict(float)}

    def _prepare_teacher(self, teacher_model):
        teacher_model.eval().requires_grad_(False)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher_model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(teacher_model, self.accelerator)
        return self.accelerator.prepare_model(teacher_model, evaluation_mode=True)

    # The parent's loss is cross-entropy alone, and on a CPU it projects every position.
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "use_cache": False}
        keep, targets = shift_for_next_token(inputs.pop("labels"))
        outputs = model(**inputs, logits_to_keep=keep, output_router_logits=self.aux_loss_enabled)

        kl = outputs.logits.new_zeros((), dtype=torch.float32)
        if self.args.kl_weight:
            with torch.no_grad():  # not inference mode: the divergence keeps these logits for its backward pass
                teacher_logits = self.teacher_model(**inputs, logits_to_keep=keep).logits
            kl = forward_kl(outputs.logits, teacher_logits.to(outputs.logits.device), self.args.temperature).sum()
        lm = F.cross_entropy(outputs.logits.float(), targets, reduction="sum")
        num_tokens = torch.as_tensor(len(targets) if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        loss = (self.args.kl_weight * kl + self.args.lm_weight * lm) / num_tokens.to(kl.device)
        # `num_items_in_batch` counts the tokens of every process, and DDP averages the gradients over them
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())

        sums = self._sums["train" if self.model.training else "eval"]
        if self.aux_loss_enabled:
            text_config = self.model.config.get_text_config()
            aux = router_aux_loss(
                outputs.router_logits,
                num_experts=text_config.num_experts,
                num_experts_per_tok=text_config.num_experts_per_tok,
                attention_mask=inputs.get("attention_mask"),
            )
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * aux / steps
            sums["aux"] += aux.detach()
        sums["batches"] += 1
        sums["tokens"] += len(targets)
        sums["kl"] += kl.detach()
        sums["lm"] += lm.detach()
        sums["correct"] += (outputs.logits.detach().argmax(-1) == targets).sum()
        return (loss, outputs) if return_outputs else loss

    # The parent averages per-batch means; these are ratios of sums over all tokens since the last call.
    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        names = ["kl", "lm", "correct", "tokens", "aux", "batches"]
        local = torch.tensor([float(self._sums[mode][name]) for name in names], device=self.accelerator.device)
        total = dict(zip(names, self.accelerator.reduce(local).tolist(), strict=True))
        self._sums[mode].clear()
        if total["tokens"]:
            prefix = "" if mode == "train" else "eval_"
            kl, lm, accuracy = (total[name] / total["tokens"] for name in ("kl", "lm", "correct"))
            aux = total["aux"] / total["batches"]
            terms = {"lm_loss": lm, "mean_token_accuracy": accuracy}
            if self.args.kl_weight:
                terms["kl"] = kl
            if self.aux_loss_enabled:
                terms["aux_loss"] = aux
            logs.update({prefix + name: value for name, value in terms.items()})
            if prefix + "loss" in logs:
                aux_term = self.router_aux_loss_coef * aux if self.aux_loss_enabled else 0.0
                logs[prefix + "loss"] = self.args.kl_weight * kl + self.args.lm_weight * lm + aux_term
        super().log(logs, start_time)

    # TRL's card names no base model and another task; `llava-mod publish` writes ours, from measured results.
    def create_model_card(self, *args, **kwargs):
        pass
