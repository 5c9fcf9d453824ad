"""Preference distillation: preference optimisation with the teacher as the reference model (paper, section 3.3)."""

import copy
import itertools
import warnings

import torch
from accelerate.utils import is_peft_model
from trl import DPOTrainer

from llava_mod_hf.data.grouping import GroupedBatches
from llava_mod_hf.losses.preference_losses import (
    PREFERENCE_LOSSES,
    Pairs,
    own_loss_names,
    response_sums,
    without_tail,
)
from llava_mod_hf.students.generation import prepare_generation
from llava_mod_hf.teachers.protocol import row_sets
from llava_mod_hf.teachers.reference_model import (
    REFERENCE_COLUMNS,
    TAIL_COLUMNS,
    ColumnsReference,
    NoReference,
    PreferenceCollator,
    WholePairs,
    check_reference,
    has_reference,
    own_reading,
)
from llava_mod_hf.teachers.shared_prefix import sharing
from llava_mod_hf.training.cached_features import use_vision_cache
from llava_mod_hf.training.given import given
from llava_mod_hf.training.logs import KeepsMetrics
from llava_mod_hf.training.noted_model import NotedModel
from llava_mod_hf.training.preference_config import PreferenceConfig
from llava_mod_hf.training.safe_run import SafeRun
from llava_mod_hf.training.trainable import train_only, trained_as_before
from llava_mod_hf.training.validation import Validates
from llava_mod_hf.training.watching import Watched

FEWEST_PAIRS = 8  # that a KL estimate of `kto_pair` should rest on

CHECKED_ROWS = 8  # whose responses are compared where teacher and student have different processors


class PreferenceTrainer(KeepsMetrics, GroupedBatches, Validates, Watched, SafeRun, DPOTrainer):
    """
    [`~trl.DPOTrainer`] whose reference is the teacher, live or computed before, or the student as it was.

        sigmoid   L = −log σ(β (c − r)),   c = log π_S(y⁺) − log π_T(y⁺),   r = log π_S(y⁻) − log π_T(y⁻)

    The parent's `_compute_loss` is long and stays its own: it is given the reference's log-probabilities with the
    batch, as if they had been precomputed, and a model whose outputs are noted on their way. From the two come the
    losses and figures that it lacks, so its changes arrive here by themselves; a test pins what this relies on.

    For every loss `margins/teacher`, `margins/student` (log π(y⁺) − log π(y⁻)) and `margins/below`, the share of pairs
    whose student margin is below the teacher's, are logged; for `kto_pair` `kto/kl_chosen`, `kto/kl_rejected` and the
    share of estimates that were clamped to 0.

    Each micro-batch is a mean over its pairs, and a step the mean of those: with micro-batches of one size, neither the
    split into accumulation steps nor that into processes changes the gradient of `sigmoid` or `margin`. `kto_pair`
    gathers its KL estimates over processes, not over accumulation steps: with smaller micro-batches they are noisier,
    and larger on average, since a mean below 0 counts as 0. The router aux is computed once over both halves of a batch
    and is not linear: its gradient depends on the split, as does that of `sft`, a mean over tokens.

    Args:
        model: the student, as in the parent.
        ref_model (`PreTrainedModel` or [`~llava_mod_hf.teachers.protocol.Reference`], *optional*):
            The teacher, or a [`~llava_mod_hf.teachers.reference_model.CachedReference`]; none with `reference="self"`,
            nor with rows that have the columns `ref_chosen_logps` and `ref_rejected_logps`.
        args (`PreferenceConfig`, *optional*).
        teacher_processor (`ProcessorMixin`, *optional*):
            The teacher's, which it reads the pairs through; without it, it reads the student's tokens and images.
        kwargs: as in the parent.

    Raises:
        ValueError: if there is no reference, more than one, or the teacher does not fit the student.
    """

    _tag_names = ["llava-mod", "preference-distillation"]
    _name = "LLaVA-MoD preference distillation"

    def __init__(self, model, ref_model=None, args=None, *, teacher_processor=None, **kwargs):
        args = args or PreferenceConfig()
        kwargs = given(args, PreferenceConfig, model, teachers=[ref_model], **kwargs)
        sets = row_sets(kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        precomputed = [has_reference(rows, ld_alpha=args.ld_alpha) for rows in sets]
        check_reference(args, ref_model, precomputed)
        teacher = ref_model if isinstance(ref_model, torch.nn.Module) else None
        reference = ColumnsReference() if any(precomputed) else ref_model if teacher is None else None
        if reference is not None:
            ref_model = NoReference()
        elif (
            args.reference == "self"
            and kwargs["peft_config"] is None
            and not isinstance(model, str)
            and not is_peft_model(model)
        ):
            # the parent would read the student's folder again, which may hold other weights by now
            ref_model = copy.deepcopy(model)
        if ref_model is not None:
            ref_model.eval().requires_grad_(False)
        super().__init__(model, ref_model, args=args, **kwargs)
        train_only(self.model, args.train_modules)
        prepare_generation(self.model, self.processing_class)
        if reference is not None:
            self.ref_model = None
        elif teacher is not None:
            reference = own_reading(
                self.model,
                teacher,
                self.processing_class,
                teacher_processor,
                collate=self.data_collator,
                examples=list(itertools.islice(self.train_dataset, CHECKED_ROWS)),
            )
        self._take(reference, sets)
        use_vision_cache(self, *([] if self.ref_model is None else [self.accelerator.unwrap_model(self.ref_model)]))

        weighted = list(zip(self.loss_types, self.loss_weights, strict=True))
        self.own_losses = [(name, weight) for name, weight in weighted if name in own_loss_names()]
        self.loss_types = [name for name, _ in weighted if name not in own_loss_names()]
        self.loss_weights = [weight for name, weight in weighted if name not in own_loss_names()]
        self._warn_of_weak_signals()

    def _take(self, reference, sets):
        """What answers for the pairs beside the parent's own tensors, if anything does."""
        if reference is None:
            return
        for rows in sets:
            reference.check_run(self.args, self.processing_class, rows)
        self.data_collator = PreferenceCollator(WholePairs(self.data_collator), reference)
        self._set_signature_columns_if_needed()
        # the parent has the former for text alone
        self._signature_columns += [*(REFERENCE_COLUMNS if self._is_vision_dataset else ()), *TAIL_COLUMNS]

    def _warn_of_weak_signals(self):
        names = [name.removesuffix("_norm") for name, _ in self.own_losses]
        processes = 1 if self.args.kto_reference_compat else self.accelerator.num_processes
        pairs = self.args.per_device_train_batch_size * processes
        if "kto_pair" in names and pairs < FEWEST_PAIRS:
            warnings.warn(
                f"The KL estimates of `kto_pair` rest on {pairs} pairs: give batches of at least {FEWEST_PAIRS} over "
                "all processes; accumulation steps do not count.",
                stacklevel=3,
            )
        if names == ["margin"] and not self.loss_types and self.args.reference == "self":
            warnings.warn(
                '`margin` with `reference="self"` starts at its optimum, where its gradient is 0: nothing will be '
                "learnt from the pairs. Give the teacher as reference, or another loss.",
                stacklevel=3,
            )

    # The parent's loss, given the reference's log-probabilities as if they had been precomputed, plus what it lacks.
    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)
        reference_inputs = inputs.pop("reference_inputs", inputs)
        tails = [inputs.pop(name, None) for name in TAIL_COLUMNS]
        if REFERENCE_COLUMNS[0] in inputs:  # computed before, of whole responses
            for name, tail in zip(REFERENCE_COLUMNS, tails, strict=True):
                inputs[name] = without_tail(inputs[name], tail, self.args.ld_alpha)
        else:
            inputs.update(zip(REFERENCE_COLUMNS, self._reference_log_probs(reference_inputs), strict=True))
        shared = self._sharing(model, self._student())
        noted = NotedModel(shared, self._student().base_model, self.model.config.get_text_config())
        # only here: `evaluate` reads it too, and would compute the references of text rows anew
        precompute_ref_logps, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            parents = super()._compute_loss(noted, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precompute_ref_logps
        loss, *outputs = parents if return_outputs else (parents,)
        loss = loss + self._own_terms(noted, inputs)
        return (loss, *outputs) if return_outputs else loss

    def _reference_log_probs(self, inputs):
        if self.ref_model is None and self.args.reference != "self":
            raise ValueError(
                f"These rows have no columns {', '.join(REFERENCE_COLUMNS)}, and there is no `ref_model`: compute them "
                "with `llava-mod cache-reference` too."
            )
        unwrapped = self._student() if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        with trained_as_before(self.model):
            return self.compute_ref_log_probs(self._sharing(self.ref_model or self.model, unwrapped), inputs)

    def _sharing(self, model, unwrapped):
        return sharing(model, unwrapped) if self.args.share_prefix else model

    def _student(self):
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def _own_terms(self, noted, inputs):
        metrics = self._metrics["train" if self.model.training else "eval"]
        mask = inputs["completion_mask"][:, 1:]
        # (chosen and rejected,), as the parent's loss and the reference have them
        student = without_tail(*response_sums(noted.log_probs[:, -mask.shape[1] :], mask), self.args.ld_alpha)
        reference = torch.cat([inputs[name] for name in REFERENCE_COLUMNS])
        self._log_margins(metrics, student.detach(), reference)
        loss = student.new_zeros(())
        for name, weight in self.own_losses:
            lengths = mask.sum(1).clamp(min=1) if name.endswith("_norm") else 1
            pairs = Pairs(
                *(student / lengths).chunk(2),
                *(reference / lengths).chunk(2),
                gather=self.accelerator.gather,
                log=lambda key, value: metrics[key].append(value),
                as_authors=self.args.kto_reference_compat,
            )
            loss = loss + weight * PREFERENCE_LOSSES[name.removesuffix("_norm")](pairs, self.beta)
        if noted.router is not None:
            self.note_routers(*noted.router)
        if noted.z_loss is not None:
            metrics["router_z_loss"].append(self.accelerator.gather(noted.z_loss.detach()).mean().item())
            loss = loss + self.model.config.get_text_config().router_z_loss_coef * noted.z_loss
        return loss

    def _log_margins(self, metrics, student, reference):
        student, teacher = (self.accelerator.gather(_margins(log_probs)) for log_probs in (student, reference))
        metrics["margins/student"].append(student.mean().item())
        metrics["margins/teacher"].append(teacher.mean().item())
        metrics["margins/below"].append((student < teacher).float().mean().item())


def _margins(log_probs):
    """log π(y⁺) − log π(y⁻) of each pair; the first half of a batch is the chosen ones."""
    chosen, rejected = log_probs.chunk(2)
    return chosen - rejected
