"""Mimic distillation: the student learns the teacher's distribution over the response tokens (paper, section 3.2)."""

import functools
import itertools
import logging
import math

import torch
from peft import PeftModel
from trl import SFTTrainer
from trl.models import prepare_deepspeed
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import maybe_gather_lm_head_ctx

from llava_mod_hf.data.grouping import GroupedBatches
from llava_mod_hf.losses.chunked_mimic import chunked_mimic_loss
from llava_mod_hf.losses.rows import shift_for_next_token
from llava_mod_hf.model.moe_llava_mod import router_losses
from llava_mod_hf.students.generation import prepare_generation
from llava_mod_hf.teachers.last_ffn import read_only
from llava_mod_hf.teachers.live_teacher import LiveTeacher
from llava_mod_hf.teachers.output_head import head_without_weights
from llava_mod_hf.teachers.protocol import row_sets
from llava_mod_hf.teachers.sharded import shard_layers, whole
from llava_mod_hf.teachers.teachers_collator import TeachersCollator
from llava_mod_hf.teachers.vision_sharing import share_vision_tower
from llava_mod_hf.teachers.vocabulary import compared_vocab_size
from llava_mod_hf.training.authors_behaviour import ReferenceCompat
from llava_mod_hf.training.cached_features import use_vision_cache
from llava_mod_hf.training.given import given
from llava_mod_hf.training.logs import BatchTerms, MimicLog, kind_of_logs
from llava_mod_hf.training.mimic_config import MimicConfig
from llava_mod_hf.training.on_policy import answer_batches, check_on_policy
from llava_mod_hf.training.safe_run import SafeRun
from llava_mod_hf.training.trainable import train_only
from llava_mod_hf.training.trainer_options import check_weights
from llava_mod_hf.training.validation import Validates
from llava_mod_hf.training.watching import Watched
from llava_mod_hf.training.whole_conversations import WholeConversations

logger = logging.getLogger(__name__)

ALIGNMENT_SAMPLE = 8  # rows on which a teacher with its own processor is compared before training


class MimicTrainer(GroupedBatches, Validates, Watched, WholeConversations, SafeRun, SFTTrainer):
    """
    [`~trl.SFTTrainer`] whose loss is that of [`MimicConfig`], on the supervised positions only.

    Hidden states are selected at those positions and projected chunk by chunk, so that no `(tokens, vocabulary)` tensor
    is built. KL and LM terms are divided by the supervised tokens of the whole optimiser step, over accumulation steps
    and processes; the router aux is averaged over them, and is not linear: its gradient depends on the split.

    Args:
        model: the student, as in the parent.
        teacher_model (`PreTrainedModel`, teacher of [`~llava_mod_hf.teachers`], `list` of them, or `None`):
            Not trained. A cached teacher is given as it is. None is needed with `kl_weight=0`.
        args (`MimicConfig`, *optional*).
        teacher_processor (`ProcessorMixin` or `list` of them, *optional*):
            Of each model among the teachers; without it the teacher reads the student's own token ids and pixels.
        kwargs: as in the parent.

    Raises:
        ValueError: if a teacher does not fit the student, or at the first step if what it says is not finite.
    """

    _tag_names = ["llava-mod", "mimic"]
    _name = "LLaVA-MoD mimic distillation"

    def __init__(self, model, teacher_model, args=None, *, processing_class=None, teacher_processor=None, **kwargs):
        args = args or MimicConfig()
        teachers = teacher_model if isinstance(teacher_model, list | tuple) else [teacher_model]
        kwargs = given(args, MimicConfig, model, teachers=teachers, **kwargs)
        super().__init__(model, args=args, processing_class=processing_class, **kwargs)
        train_only(self.model, args.train_modules)
        prepare_generation(self.model, self.processing_class)
        self.compat = ReferenceCompat(args.reference_compat, vocab_size=args.reference_vocab_size)
        self.teachers = self._make_teachers(teacher_model, teacher_processor) if args.kl_weight else []
        use_vision_cache(self, *(teacher.model for teacher in self.teachers if isinstance(teacher, LiveTeacher)))
        if args.kl_weight and not self.teachers:
            raise ValueError(f"`kl_weight` is {args.kl_weight}, and there is no `teacher_model`: give one, or 0.")
        check_weights("`teacher_weights`", args.teacher_weights, count=len(self.teachers))
        self.teacher_weights = args.teacher_weights or [1 / len(self.teachers) for _ in self.teachers]
        student = self._base_student(self.model)
        if self._has_router_term and not hasattr(student.config.get_text_config(), "router_aux_loss_type"):
            raise ValueError(
                f"{type(student).__name__} is a mixture of experts whose router losses are not known here: give "
                "`router_aux_loss_coef: 0`, or a student that `upcycle` has made."
            )
        self.shared_vocab_size = compared_vocab_size(student, self.teachers, self.compat)
        self._student_head = head_without_weights(student)
        self.compat.prepare(student, self.teachers)
        self._prepare_data()
        self._redirect = _ForwardRedirection()
        self._unsure = bool(self.teachers)  # until a first answer of all teachers was finite
        self._warned = False
        self._log = MimicLog(args, self.teacher_weights)

    def _make_teachers(self, teachers, processors):
        teachers = teachers if isinstance(teachers, list | tuple) else [teachers]
        processors = processors if isinstance(processors, list | tuple) else [processors] * len(teachers)
        if len(processors) != len(teachers):
            raise ValueError(f"There are {len(teachers)} teachers and {len(processors)} `teacher_processor`s.")
        made = []
        for teacher, processor in zip(teachers, processors, strict=True):
            if isinstance(teacher, torch.nn.Module):
                teacher = LiveTeacher(
                    teacher,
                    student=self._base_student(self.model),
                    processor=self.processing_class,
                    teacher_processor=processor,
                    collator=self.data_collator,
                )
            if isinstance(teacher, LiveTeacher):
                if self.args.share_vision_tower:
                    teacher.model = share_vision_tower(
                        self._base_student(self.model), teacher.model, self.processing_class, processor
                    )
                teacher.model = self._prepare_teacher(teacher.model)
            if teacher is not None:
                made.append(teacher)
        return made

    def _prepare_teacher(self, teacher_model):
        teacher_model.eval().requires_grad_(False)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher_model, self.accelerator)
        if not self.is_fsdp_enabled:
            return self.accelerator.prepare_model(teacher_model, evaluation_mode=True)
        if self.args.shard_teacher:
            shard_layers(teacher_model, self.accelerator)
        return teacher_model.to(self.accelerator.device)

    def _prepare_data(self):
        # a cache has no collator, and its answers come with the batch as well
        apart = [teacher for teacher in self.teachers if getattr(teacher, "collator", self) is not None]
        for teacher, rows in itertools.product(self.teachers, row_sets(self.train_dataset, self.eval_dataset)):
            teacher.check_run(self.args, self.processing_class, rows)
        if self.args.on_policy_share:
            check_on_policy(self.train_dataset, self.teachers)
        if apart and self.train_dataset is not None:
            examples = list(itertools.islice(self.train_dataset, ALIGNMENT_SAMPLE))
            for teacher in apart:
                teacher.check_alignment(examples, self.data_collator([dict(example) for example in examples]))
        if apart or self.args.on_policy_share:
            self.data_collator = TeachersCollator(self.data_collator, self.teachers, bool(self.args.on_policy_share))

    @staticmethod
    def _base_student(model):
        return model.get_base_model() if isinstance(model, PeftModel) else model

    # Before the parent counts the tokens of the step: the student's answers have another number of them.
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self.args.on_policy_share:
            return batches, num_items
        batches = answer_batches(self, batches)
        return batches, self._get_num_items_in_batch(batches, device)

    # The parent's loss is cross-entropy alone, and on a CPU it projects every position.
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {name: value for name, value in inputs.items() if name != "examples"}
        labels, on_policy = inputs.pop("labels"), inputs.pop("on_policy", False)
        own_inputs = [inputs.pop(f"teacher_{i}", {}) for i in range(len(self.teachers))]
        student = self.accelerator.unwrap_model(model)
        # Inside the wrapper's forward, where DDP, FSDP2 and ZeRO-3 expect the head to be used
        batch = self._redirect(
            model, student, self._terms, student, inputs, own_inputs, labels, on_policy, num_items_in_batch
        )
        self._check_first_answer(batch.terms)
        loss = batch.terms.loss
        # `num_items_in_batch` counts the tokens of every process, and DDP averages the gradients over them
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if batch.router is not None:
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self._router_term(*batch.router) / steps
        self._note(batch, inputs, on_policy)
        if return_outputs:  # for `compute_metrics`, which reads logits that the loss does not build
            with torch.no_grad():
                return loss, model(**inputs)
        return loss

    def _terms(self, student, inputs, own_inputs, labels, on_policy, num_items):
        """[`BatchTerms`]."""
        student = self._base_student(student)
        inputs, labels, kl_labels = self.compat.mimic_positions(inputs, labels)
        count, mask = self._rows_that_count(len(labels)), inputs.get("attention_mask")
        with self.accelerator.autocast():  # the redirection goes around accelerate's own
            watched = self._has_router_term or self._router_balance is not None
            router = {"output_router_logits": True} if watched else {}
            read_only(student.base_model, shift_for_next_token(labels)[0] | shift_for_next_token(kl_labels)[0])
            outputs = student.base_model(**inputs, **router, use_cache=False)
            # after the student, whose image features a teacher may take over
            rows = [
                self._ask(i, teacher, inputs, own, kl_labels)
                for i, (teacher, own) in enumerate(zip(self.teachers, own_inputs, strict=True))
            ]
            if count < len(labels):
                labels, kl_labels, rows, mask = _first_rows(count, labels, kl_labels, rows, mask)
            terms = self._mimic_terms(
                student, outputs.last_hidden_state, labels, kl_labels, rows, num_items, on_policy=on_policy
            )
        router = None
        if self._has_router_term:
            router = router_losses(outputs.router_logits, student.config.get_text_config(), mask)
        if watched:
            self.note_routers(outputs.router_logits, inputs["input_ids"], mask, labels)
        unaligned = [0 if row.aligned is None else (~row.aligned).sum() for row in rows]
        return BatchTerms(terms, router, labels, count, unaligned)

    def _rows_that_count(self, count):
        """All but those of an evaluation's last batches which are there twice, to give every process as many."""
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes // self.get_tp_size()
        if self.model.training or processes == 1 or not state.end_of_dataloader or state.remainder < 1:
            return count
        before = self.accelerator.process_index // self.get_tp_size() * count
        return min(max(state.remainder - before, 0), count)

    def _ask(self, i, teacher, inputs, own_inputs, labels):
        try:
            return teacher.rows(inputs, own_inputs, labels)
        except ValueError as error:
            raise ValueError(f"Teacher {self._teacher_name(i)}: {error}") from error

    def _mimic_terms(self, student, hidden, labels, kl_labels, rows, num_items, *, on_policy):
        layer = student.get_output_embeddings()
        weight, bias = (whole(parameter) for parameter in (layer.weight, getattr(layer, "bias", None)))
        keep, targets = shift_for_next_token(labels)
        num_items = len(targets) if num_items is None else num_items
        lm_weight = 0.0 if on_policy else self.args.lm_weight
        with maybe_gather_lm_head_ctx(layer.weight, getattr(layer, "bias", None)):
            loss = functools.partial(
                chunked_mimic_loss,
                head=self._student_head._replace(weight=weight, bias=bias),
                divergence=self.compat.divergence(self.args.divergence),
                temperature=self.args.temperature,
                jsd_beta=self.args.jsd_beta,
                kl_weight=self.args.kl_weight,
                teacher_weights=self.teacher_weights,
                num_items=num_items,
                shared_vocab_size=self.shared_vocab_size,
                targets_for_unaligned=not on_policy,
                rows_per_chunk=self.args.rows_per_chunk,
            )
            hidden = hidden.to(weight.device)  # with the model on several devices
            if kl_labels is labels:
                return loss(hidden[keep], targets=targets, teachers=rows, lm_weight=lm_weight)
            kl_keep, kl_targets = shift_for_next_token(kl_labels)
            kl = loss(hidden[kl_keep], targets=kl_targets, teachers=rows, lm_weight=0.0)
            lm = loss(hidden[keep], targets=targets, teachers=[], teacher_weights=[], lm_weight=lm_weight)
            return lm._replace(loss=kl.loss + lm.loss, kl=kl.kl)

    def _teacher_name(self, i):
        model = getattr(self.teachers[i], "model", None)
        return f"{i} (`{getattr(model, 'name_or_path', '') or type(model or self.teachers[i]).__name__}`)"

    def _check_first_answer(self, terms):
        if self._unsure and terms.lm.isfinite():  # else the student is the one to blame
            for i, value in enumerate(terms.kl.tolist()):
                if not math.isfinite(value):
                    raise ValueError(
                        f"Teacher {self._teacher_name(i)}: its divergence from the student is {value}, although the "
                        "student's own loss is finite: check the teacher's weights, its dtype and its vocabulary."
                    )
            self._unsure = False

    def _note(self, batch, inputs, on_policy):
        mode = "train" if self.model.training else "eval"
        # processes of tensor parallelism read the same rows
        counts = mode == "train" and self.accelerator.process_index % self.get_tp_size() == 0
        tokens_read = int(inputs["attention_mask"].sum()) if counts else 0
        empty = self._log.note(mode, batch, on_policy=on_policy, tokens_read=tokens_read)
        if empty and not self._warned:
            logger.warning(
                "%d of %d rows of a batch have no supervised tokens: nothing is learnt from them, and they are counted "
                "as `rows_without_tokens`.",
                empty,
                batch.rows,
            )
            self._warned = True

    # The parent averages per-batch means; these are ratios of sums over all tokens since the last call.
    def log(self, logs, start_time=None):
        kind = kind_of_logs(logs)
        if kind is not None:
            mode, prefix = kind
            terms = self._log.take(mode, self.accelerator, self._router_term if self._has_router_term else None)
            loss = terms.pop("loss", None)
            logs.update({prefix + name: value for name, value in terms.items()})
            if loss is not None and prefix + "loss" in logs:
                logs[prefix + "loss"] = loss
        super().log(logs, start_time)

    def _router_term(self, aux, z):
        return self.router_aux_loss_coef * self.compat.aux_factor * aux + self._z_coef * z

    @property
    def _z_coef(self):
        return getattr(self.model.config.get_text_config(), "router_z_loss_coef", 0.0)

    @property
    def _has_router_term(self):
        return self.aux_loss_enabled or self._z_coef != 0


def _first_rows(count, labels, kl_labels, rows, mask):
    """Labels, teachers' rows and attention mask of the first `count` sequences alone; the shapes stay."""
    same = kl_labels is labels

    def first(values, others):
        return torch.cat([values[:count], torch.full_like(values[count:], others)])

    labels, kl_labels = first(labels, -100), first(kl_labels, -100)
    supervised = len(shift_for_next_token(kl_labels)[1])
    rows = [row.first(supervised) for row in rows]
    return labels, labels if same else kl_labels, rows, first(mask, 0) if count and mask is not None else mask
