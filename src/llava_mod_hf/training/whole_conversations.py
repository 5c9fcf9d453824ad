"""Rows of several answers in a trainer: one pass of each, all answers supervised."""

import dataclasses

from transformers import Trainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from llava_mod_hf.data.conversations import (
    AnswersCollator,
    check_assistant_only,
    expand_conversations,
    supervises_answers,
)
from llava_mod_hf.data.fitting import LENGTH


class WholeConversations(Trainer):
    """
    For a trainer, before its own parent: of rows of `messages`, or with a completion of several turns, every answer is
    supervised in one pass; those whose history the chat template rewrites become a row for each answer, where they did
    not go through [`~llava_mod_hf.data.fitting.fit_rows`], which does the same. A `data_collator` of one's own stays.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        columns = next(iter(self.train_dataset))
        if self.args.assistant_only_loss:
            check_assistant_only(columns)
        collator = self.data_collator
        if kwargs.get("data_collator") is not None or not isinstance(collator, DataCollatorForVisionLanguageModeling):
            return
        options = {item.name: getattr(collator, item.name) for item in dataclasses.fields(collator)}
        options["completion_only_loss"] = supervises_answers(self.args, columns)
        self.data_collator = AnswersCollator(**options)
        if options["completion_only_loss"] and not self.args.assistant_only_loss:
            self.train_dataset = self._readable(self.train_dataset)
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {name: self._readable(rows) for name, rows in self.eval_dataset.items()}
            else:
                self.eval_dataset = self._readable(self.eval_dataset)

    def _readable(self, rows):
        if rows is None or LENGTH in (rows.column_names or []):
            return rows
        return expand_conversations(rows, self.processing_class, num_proc=self.args.dataset_num_proc)
