"""What the commands that read rows do with their options: they load student, teacher and rows, and fit these."""

import dataclasses
from pathlib import Path

from llava_mod_hf.commands.parts import load_without_adapter
from llava_mod_hf.data.dropped_rows import FILE, DroppedRows
from llava_mod_hf.data.fitting import fit_rows
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.data.marked_rows import leave_out_marked
from llava_mod_hf.data.row_files import SUFFIXES
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.teachers.answer_cache import teacher_settings
from llava_mod_hf.training.lora import SAVE_FIRST
from llava_mod_hf.training.trainer_options import limit_max_length


def load_student(args, trust_remote_code):
    """`(model, processor)` of the student that [`~llava_mod_hf.commands.arguments.DistillArguments`] name."""
    return load_without_adapter(
        args.student, attn_implementation=args.attn_implementation, trust_remote_code=trust_remote_code
    )


def load_teacher(args, trust_remote_code):
    """`(model, processor)` of their teacher."""
    return load_model_and_processor(
        args.teacher,
        dtype=args.teacher_dtype,
        quantization=args.teacher_quantization,
        device=args.teacher_device,
        attn_implementation=args.attn_implementation,
        trust_remote_code=trust_remote_code,
    )


def load_teacher_or_cache(args, trust_remote_code, cached):
    """
    Who answers for the rows: what was written before if there is a `teacher_cache`, else the teacher itself.

    Args:
        args ([`~llava_mod_hf.commands.arguments.DistillArguments`]).
        trust_remote_code (`bool`).
        cached (`type`): what reads such a cache.

    Returns:
        `tuple`: the teacher, and its processor, `None` of a cache.
    """
    if args.teacher_cache:
        return cached(args.teacher_cache, expected=settings_of_teacher(args, trust_remote_code)), None
    return load_teacher(args, trust_remote_code)


def settings_of_teacher(args, trust_remote_code):
    """What a cache of the teacher has to be made with, for these arguments."""
    return teacher_settings(
        args.teacher,
        dtype=args.teacher_dtype,
        quantization=args.teacher_quantization,
        trust_remote_code=trust_remote_code,
    )


def refuse_adapter_of_new_student(args, making):
    """
    Raises:
        ValueError: if a stage would save an adapter alone, of a student that it makes itself and nobody has.
    """
    if args.use_peft:
        raise ValueError(
            f"`use_peft` is true, and this stage {making}, which an adapter's folder would not have: {SAVE_FIRST}."
        )


def load_eval_rows(data_args, args, columns, dropped=None):
    """
    Rows that a stage is evaluated on, of other ones than it is trained on.

    Args:
        data_args ([`~llava_mod_hf.data.arguments.DataArguments`]).
        args (`TrainingArguments`): of the stage.
        columns (`tuple[str]`), dropped (*optional*): as for [`~llava_mod_hf.data.load.load_rows`].

    Returns:
        `datasets.Dataset` or `None`: those of `eval_dataset_name`, or else of the data set's `dataset_test_split`;
        none without `eval_strategy`, nor with `test_split_size`.

    Raises:
        ValueError: if they would be the training rows, or an option does nothing.
    """
    name = data_args.eval_dataset_name
    held_out = args.test_split_size is not None
    if held_out and data_args.streaming:
        raise ValueError(
            f"`test_split_size` is {args.test_split_size}, and streamed rows cannot be told apart before they come: "
            "give `eval_dataset_name`, or leave out `streaming`."
        )
    if args.eval_strategy == "no" or held_out:
        for option in ("eval_dataset_name", "max_eval_samples"):
            value = getattr(data_args, option)
            if value is not None:
                needed = "leave out `test_split_size`" if held_out else "give `eval_strategy` too, or neither"
                raise ValueError(f"`{option}` is {value!r}, which does nothing here: {needed}.")
        return None
    trained = data_args.names()
    same = name is None or any(Path(name).resolve() == Path(each).resolve() for each in trained)
    one_file = data_args.datasets is not None or Path(trained[0]).suffix in SUFFIXES
    if same and (one_file or data_args.dataset_test_split == data_args.dataset_train_split):
        raise ValueError(
            f"`eval_strategy` is `{args.eval_strategy.value}`, and `{'`, `'.join(trained)}` has no rows apart from "
            "those that are trained on: give `test_split_size`, which holds some out, another `eval_dataset_name`, or "
            "of a single data set another `dataset_test_split`."
        )
    own = dataclasses.replace(
        data_args,
        dataset_name=name or data_args.dataset_name,
        datasets=None,
        stopping_strategy=None,
        max_samples=data_args.max_eval_samples,
        streaming=False,
        **({} if same else {"dataset_options": None}),
    )
    return load_rows(
        own,
        columns=columns,
        split=data_args.dataset_test_split,
        seed=args.seed,
        num_proc=args.dataset_num_proc,
        dropped=dropped,
    )


def fit_to_recipe(rows, student, processor, data_args, args, dropped=None, *, evaluated=False):
    """
    [`~llava_mod_hf.data.fitting.fit_rows`] with the options of a recipe, within the student's positions; of `None`,
    none.

    Args:
        rows (`datasets.Dataset`, `datasets.IterableDataset` or `None`), student, processor, data_args, args.
        dropped ([`~llava_mod_hf.data.dropped_rows.DroppedRows`], *optional*): where left-out rows are written down.
        evaluated (`bool`, *optional*, defaults to `False`): whether they are those of [`load_eval_rows`].

    Raises:
        ValueError: if rows are streamed without `max_steps`, or `max_length` is more than the student has positions.
    """
    if rows is None:
        return None
    dropped = dropped or DroppedRows(max_share=data_args.max_bad_rows)
    limit_max_length(args, student)
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError("`streaming` is true, so nobody knows how many rows come: give `max_steps`.")
    rows, _ = fit_rows(
        rows,
        processor,
        max_length=args.max_length,
        multi_turn=data_args.multi_turn,
        assistant_only_loss=getattr(args, "assistant_only_loss", False),  # of pairs there is no such option
        bad_rows=data_args.bad_rows,
        num_proc=args.dataset_num_proc,
        dropped=dropped.of(_evaluated_name(data_args) if evaluated else data_args.names()[0]),
    )
    return rows


def _evaluated_name(data_args):
    name, split = data_args.eval_dataset_name or data_args.names()[0], data_args.dataset_test_split
    return name if split == "train" else f"{name} ({split})"


def unmarked(rows, processor, data_args, dropped, columns=("prompt",)):
    """[`~llava_mod_hf.data.marked_rows.leave_out_marked`] with the options of a recipe."""
    dropped = dropped.of(data_args.names()[0])
    return leave_out_marked(rows, processor, columns=columns, bad_rows=data_args.bad_rows, dropped=dropped)


def written_down(data_args, place, *, writes=True):
    """
    Where a command that writes something other than a run's folder writes down the rows that it leaves out: beside it.

    Args:
        data_args ([`~llava_mod_hf.data.arguments.DataArguments`]).
        place (`str` or `Path`): a folder or a file, such as `runs/pairs`, which gives `runs/pairs.dropped_rows.jsonl`.
        writes (`bool`, *optional*, defaults to `True`): whether this process does, of several that read the same.

    Returns:
        [`~llava_mod_hf.data.dropped_rows.DroppedRows`].
    """
    place = Path(place)
    return DroppedRows(place.with_name(f"{place.name}.{FILE}"), max_share=data_args.max_bad_rows, writes=writes)
