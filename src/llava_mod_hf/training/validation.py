"""Validation of a run: rows held out of training, answers measured at each evaluation, and an early stop."""

import contextlib
import logging

import datasets
from datasets import Dataset, IterableDataset
from transformers import EarlyStoppingCallback, Trainer
from trl.models.utils import unwrap_model_for_generation

from llava_mod_hf.data.held_out import hold_out
from llava_mod_hf.evaluation.answers import generate_answers
from llava_mod_hf.evaluation.measures import score
from llava_mod_hf.evaluation.questions import ANSWER, KIND, QUESTION, question_texts
from llava_mod_hf.training.examples import keep_examples

logger = logging.getLogger(__name__)


def with_held_out(args, train_dataset=None, eval_dataset=None, **arguments):
    """
    A trainer's arguments, where `test_split_size` has split the rows.

    Args:
        args ([`~llava_mod_hf.training.validation_options.ValidationOptions`]): of the trainer.
        train_dataset, eval_dataset, arguments: the trainer's own.

    Returns:
        `dict`: the same, with the rows that are trained and evaluated on.

    Raises:
        ValueError: if there is nothing to evaluate on, or more than one thing.
    """
    if args.test_split_size is not None:
        if eval_dataset is not None or train_dataset is None:
            raise ValueError(
                f"`test_split_size` is {args.test_split_size}, which holds rows out of the training rows, "
                f"and there are {'none' if train_dataset is None else 'rows to evaluate on already'}: give one of "
                "the two."
            )
        train_dataset, eval_dataset = hold_out(train_dataset, args.test_split_size, seed=args.seed)
        logger.warning("Held out %d rows; %d are trained on.", len(eval_dataset), len(train_dataset))
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ValueError(
            f"`eval_strategy` is `{args.eval_strategy.value}`, and there are no rows to evaluate on: give "
            "`test_split_size`, which holds some out, an `eval_dataset`, or leave it out."
        )
    sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    if train_dataset is not None and any(rows is train_dataset for rows in sets):
        logger.warning("The rows that are evaluated on are those that are trained on.")
    return {"train_dataset": train_dataset, "eval_dataset": eval_dataset, **arguments}


class Validates(Trainer):
    """
    For a trainer, before its own parent: `eval_answers` and `early_stopping_patience` of
    [`~llava_mod_hf.training.validation_options.ValidationOptions`].
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.early_stopping_patience is not None:
            self.add_callback(
                EarlyStoppingCallback(self.args.early_stopping_patience, self.args.early_stopping_threshold)
            )
        if self.args.eval_answers:
            self._set_signature_columns_if_needed()
            self._signature_columns += [QUESTION, ANSWER, KIND]  # which the parent would take out of the rows

    # Here, since what the loop returns is logged, watched by `EarlyStoppingCallback` and chosen from by the parent.
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.args.eval_answers:
            for name, value in self._measure_answers(dataloader.dataset, metric_key_prefix).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _measure_answers(self, rows, prefix):
        """
        The figures of the student's answers, which are kept as examples too; with sharded weights all processes
        generate together, the same ones.
        """
        with _without_bars():
            rows, has_kinds = asked(rows, self.args.eval_answers)
        with (
            unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model,
            self.accelerator.autocast(),
        ):
            answers = generate_answers(
                model, self.processing_class, rows, batch_size=self.args.per_device_eval_batch_size
            )
        keep_examples(self, rows, answers, prefix)
        texts = {f"{name}s": list(rows[name]) for name in (QUESTION, KIND)}
        scores = score(predictions=answers, references=list(rows[ANSWER]), **texts)
        if not has_kinds:
            del scores["exact_match_by_kind"]
        return flat(scores)


@contextlib.contextmanager
def _without_bars():
    """Without the bars of `datasets`, of which each evaluation would leave one below the training's."""
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def asked(rows, count):
    """
    A sample of rows as they are asked and measured.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): of a trainer.
        count (`int`): how many; spread over a data set, the first ones of a stream.

    Returns:
        `tuple[Dataset, bool]`: `images`, `prompt`, `question`, `answer` and `kind`, the last three from the rows, or
        from the turns: of a conversation in one row its first answer; and whether they have a `kind`.

    Raises:
        ValueError: if they are no conversations.
    """
    if isinstance(rows, IterableDataset):
        rows = Dataset.from_list(list(rows.take(count)), features=rows.features)
    total = len(rows)
    chosen = sorted({number * total // min(count, total) for number in range(min(count, total))})
    rows = rows.select(chosen)
    names, has_kinds = rows.column_names, KIND in rows.column_names
    told = {name: list(rows[name]) for name in names if name not in ("images", "image")}
    if "messages" in names:
        told |= {
            "prompt": [turns[:-1] for turns in told["messages"]],
            ANSWER: [turns[-1:] for turns in told["messages"]],
        }
    answers = told.get(ANSWER) or told.get("completion") or told.get("chosen")
    if not answers or any(isinstance(turns, str) for turns in told.get("prompt", [""])):
        raise ValueError(
            f"`eval_answers` asks the prompts of conversations, and these rows have {', '.join(names)}: give rows of "
            "messages, or leave it out."
        )
    if "image" in names:
        rows = rows.map(lambda row: {"images": [row["image"]]})
    rows = rows.select_columns("images")
    for name, values in {"prompt": told["prompt"], **question_texts(told)}.items():
        rows = rows.add_column(name, values)
    return rows, has_kinds


def flat(scores):
    """Figures within figures by names with a slash, without those that could not be measured."""
    found = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            found |= {f"{name}/{key}": each for key, each in flat(value).items()}
        elif value is not None:
            found[name] = value
    return found
