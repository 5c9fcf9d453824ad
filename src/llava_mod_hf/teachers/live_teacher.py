"""A teacher that answers at every step."""

import dataclasses
import logging

import torch
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from llava_mod_hf.data.conversations import RewrittenHistory
from llava_mod_hf.fingerprints import processor_parts
from llava_mod_hf.losses.rows import ProjectedRows, shift_for_next_token
from llava_mod_hf.teachers.last_ffn import read_only
from llava_mod_hf.teachers.output_head import head_of
from llava_mod_hf.teachers.response_alignment import align_labels, check_responses
from llava_mod_hf.teachers.sharded import whole_head
from llava_mod_hf.teachers.unique_images import encode_once
from llava_mod_hf.teachers.vocabulary import check_teacher, shared_vocab_size

logger = logging.getLogger(__name__)


class LiveTeacher:
    """
    A teacher that answers at every step, with its own processor where that differs from the student's.

    Args:
        model (`PreTrainedModel`): any vision-language model of the student's tokenizer.
        student (`PreTrainedModel`): whom it teaches.
        processor (`ProcessorMixin`): the student's.
        teacher_processor (`ProcessorMixin`, *optional*): the teacher's own; by default it reads the student's tensors.
        collator: the student's collator, a dataclass of TRL with a `processor`; needed where the processors differ.

    Attributes:
        shared_vocab_size (`int` or `None`): as [`shared_vocab_size`] finds it.

    Raises:
        ValueError: if it does not fit the student.
    """

    def __init__(self, model, *, student, processor, teacher_processor=None, collator=None):
        self.model = model.eval().requires_grad_(False)
        self.shared_vocab_size = shared_vocab_size(student, model, processor, teacher_processor)
        self.tokenizer = processor.tokenizer
        self.collator = None
        if teacher_processor is None or processor_parts(teacher_processor) == processor_parts(processor):
            check_teacher(student, model, processor, teacher_processor)
        else:
            self.collator = self._collator_like(collator, teacher_processor)
        # what has no weights, as where a run is only planned, has no logits to compare either
        self._head = None if model.device.type == "meta" else head_of(model)

    @property
    def head(self):
        """[`~llava_mod_hf.losses.Head`] of the shared tokens; from the parameter itself, which moves with the model."""
        return whole_head(self._head, slice(self.shared_vocab_size))

    @staticmethod
    def _collator_like(collator, processor):
        if not dataclasses.is_dataclass(collator) or not hasattr(collator, "processor"):
            raise ValueError(
                "The teacher has a processor of its own, which has to read the rows as they are, and the student's "
                f"come through a {type(collator).__name__}: give rows with a column `images`, empty lists for text."
            )
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        options = {"processor": processor, "max_length": None}
        if getattr(collator, "assistant_only_loss", False):
            marked = has_generation_markers(processor.chat_template)
            options["chat_template"] = None if marked else get_training_chat_template(processor)
        return dataclasses.replace(collator, **options)

    def _own_batch(self, examples):
        """What the teacher's processor makes of rows; the collator writes into them."""
        try:
            return dict(self.collator([dict(example) for example in examples]))
        except RewrittenHistory as error:
            raise ValueError(f"Of the teacher's own chat template: {error}") from error

    def check_run(self, args, processor, rows):
        """Nothing: it was compared with the student when it was made."""

    def collate(self, examples, batch):
        """
        The teacher's own tensors of the same rows, and which of the student's tokens it speaks about.

        Args:
            examples (`list[dict]`): rows as the data set yields them; not changed.
            batch (`dict`): what the student's collator made of them.

        Returns:
            `dict[str, torch.Tensor]`: `{}` if teacher and student read the same tensors; else the inputs of its model,
            `keep` `(batch, teacher sequence)`, the positions whose hidden states are asked for, and `aligned`
            `(batch, sequence)`, the student's positions that they answer to. Both are boolean.
        """
        if self.collator is None:
            return {}
        own = self._own_batch(examples)
        aligned, keep = align_labels(batch["labels"], own.pop("labels"), self.tokenizer)
        return {**own, "keep": keep, "aligned": aligned}

    def check_alignment(self, examples, batch):
        """
        Refuses a teacher whose responses are not the student's, on a sample of rows.

        Args:
            examples (`list[dict]`), batch (`dict`): as for [`collate`].

        Returns:
            `float`: share of the response tokens, ends of turns included, that have no counterpart.

        Raises:
            ValueError: as [`~llava_mod_hf.teachers.response_alignment.check_responses`].
        """
        if self.collator is None:
            return 0.0
        their_labels = self._own_batch(examples)["labels"]
        share = check_responses(batch["labels"], their_labels, self.tokenizer)
        logger.info("The teacher says nothing about %.1f %% of the response tokens.", 100 * share)
        return share

    def rows(self, student_inputs, own_inputs, labels):
        """
        The teacher's hidden states where it predicts the student's response tokens.

        Runs under the caller's autocast, if any.

        Args:
            student_inputs (`dict`): the student's model inputs, without labels.
            own_inputs (`dict`): what [`collate`] returned.
            labels (`torch.LongTensor` of shape `(batch, sequence)`): the student's, unshifted.

        Returns:
            [`~llava_mod_hf.losses.rows.ProjectedRows`].

        Raises:
            ValueError: if a hidden state is not finite.
        """
        keep, _ = shift_for_next_token(labels)
        aligned, inputs = None, student_inputs
        if own_inputs:
            inputs = {name: value for name, value in own_inputs.items() if name not in ("keep", "aligned")}
            aligned, keep = own_inputs["aligned"][keep], own_inputs["keep"]
        device, head = self.model.device, self.head
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        encode_once(self.model)
        read_only(self.model.base_model, keep)
        with torch.inference_mode():
            hidden = self.model.base_model(**{**inputs, "use_cache": False}).last_hidden_state
            hidden = hidden[keep.to(hidden.device)].to(head.weight.device)
        if not torch.isfinite(hidden).all():
            raise ValueError(
                f"The teacher's hidden states are not finite at {(~torch.isfinite(hidden)).any(-1).sum()} of "
                f"{len(hidden)} positions: its weights are broken, or `teacher_dtype` cannot hold its activations."
            )
        return ProjectedRows(
            hidden.clone(), head, aligned
        )  # a copy: inference tensors cannot be saved for a backward pass
