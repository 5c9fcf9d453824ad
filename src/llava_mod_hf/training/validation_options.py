"""Options of validation, apart from what does it, so that `--help` need not import that."""

from dataclasses import dataclass, field

# logged figures that are better when they are lower, beside losses and those that the measures say it of
LOWER_IS_BETTER = ("kl", "entropy", "margins/below", "unaligned")


@dataclass
class ValidationOptions:
    """
    What a run is validated on, beside [`~transformers.TrainingArguments`]' `eval_strategy`, `eval_steps`,
    `load_best_model_at_end` and `metric_for_best_model`, which may be any figure of an evaluation.

    Args:
        test_split_size (`float`, *optional*):
            Share of the rows below 1, or number of them, that is held out of training and evaluated on; chosen by
            `seed` and by picture, see [`~llava_mod_hf.data.held_out.hold_out`].
        eval_answers (`int`, *optional*, defaults to 0):
            Rows, spread over those that are evaluated on, that the student answers at each evaluation, greedily and in
            up to 64 tokens; exact match, and the other measures of [`~llava_mod_hf.evaluation.measures.MEASURES`] that
            apply, become figures of it.
        early_stopping_patience (`int`, *optional*):
            Evaluations in a row without a better `metric_for_best_model` after which the run ends, by
            [`~transformers.EarlyStoppingCallback`].
        early_stopping_threshold (`float`, *optional*, defaults to 0.0): what counts as better.
    """

    test_split_size: float | None = field(default=None)
    eval_answers: int = 0
    early_stopping_patience: int | None = field(default=None)
    early_stopping_threshold: float = 0.0


def choose_direction(args):
    """
    Sets `greater_is_better` of `metric_for_best_model` if nobody chose it. Called before the parent's checks, which
    take every figure but a loss for one that is better when higher, divergences and hallucinations too.
    """
    name = _metric(args)
    if name is None or args.greater_is_better is not None:
        return
    if name in (*LOWER_IS_BETTER, *_measured()[1]) or name.startswith("kl_teacher_"):
        args.greater_is_better = False


def check_validation(args):
    """
    Called after the parent's checks. An early stop counts evaluations over a resumption too.

    Raises:
        ValueError: if an option does nothing without another, or a value is none.
    """
    evaluates = args.eval_strategy != "no"
    for name, off in (("test_split_size", None), ("eval_answers", 0), ("early_stopping_patience", None)):
        value = getattr(args, name)
        if value != off and not evaluates:
            raise ValueError(
                f"`{name}` is {value!r}, which does nothing without `eval_strategy`: give that too (`steps` or "
                "`epoch`), or neither."
            )
    size, patience = args.test_split_size, args.early_stopping_patience
    if size is not None and not (0 < size < 1 or (size >= 1 and size == int(size))):
        raise ValueError(f"`test_split_size` is {size}: give a share between 0 and 1, or a number of rows.")
    if args.eval_answers < 0:
        raise ValueError(f"`eval_answers` is {args.eval_answers}: give a number of rows, 0 for none.")
    if patience is not None and patience < 1:
        raise ValueError(f"`early_stopping_patience` is {patience}: give at least 1, or leave it out.")
    if args.early_stopping_threshold and patience is None:
        raise ValueError(
            f"`early_stopping_threshold` is {args.early_stopping_threshold}, which does nothing without "
            "`early_stopping_patience`: give that too, or neither."
        )
    if patience is not None and args.metric_for_best_model is None:
        raise ValueError(
            f"`early_stopping_patience` is {patience}, and nothing says which figure has to get better: give "
            "`metric_for_best_model`, such as `loss`."
        )
    if patience is not None:
        args.restore_callback_states_from_checkpoint = True
    if _metric(args) is not None and _metric(args).partition("/")[0] in _measured()[0] and not args.eval_answers:
        raise ValueError(
            f"`metric_for_best_model` is `{args.metric_for_best_model}`, a measure of answers, and `eval_answers` is "
            "0: give the number of rows that are answered at each evaluation."
        )


def _metric(args):
    return None if args.metric_for_best_model is None else args.metric_for_best_model.removeprefix("eval_")


def _measured():
    """Figures of answers, and those of them that are better when lower."""
    # only here: they import what reads data, for which `--help` need not wait
    from llava_mod_hf.evaluation.measures import MEASURES

    given = {name for measure in MEASURES.values() for name in measure.gives}
    return given, {name for measure in MEASURES.values() for name in measure.lower_is_better}
