"""A data set's rows as they are asked, and all that is known of them: the same for `evaluate` and for the harnesses."""

from pathlib import Path

from llava_mod_hf.data.load import image_root
from llava_mod_hf.data.row_files import files_of
from llava_mod_hf.evaluation.benchmarks import prepared
from llava_mod_hf.evaluation.questions import row_texts, with_questions
from llava_mod_hf.evaluation.rotations import with_suffix


def asked_rows(rows, data_args, *, measures, prompt_suffix=None):
    """
    Args:
        rows (`datasets.Dataset`): of the test split, as [`~llava_mod_hf.data.load.load_rows`] returns them.
        data_args ([`~llava_mod_hf.data.arguments.DataArguments`]): what they were loaded by.
        measures (`list[str]`): of [`~llava_mod_hf.evaluation.benchmarks.BENCHMARKS`].
        prompt_suffix (`str`, *optional*): put below every question.

    Returns:
        `tuple`: the rows (`datasets.Dataset`), with `images`, `prompt` and what answers are measured by, and the texts
        of each (`list[dict]`), all columns of its data set but the pictures.
    """
    rows = with_questions(rows)
    files = files_of(Path(data_args.dataset_name), data_args.dataset_test_split) if image_root(data_args) else []
    rows, texts = prepared(rows, row_texts(rows, [file for file in files if file.suffix != ".parquet"]), measures)
    return (with_suffix(rows, prompt_suffix) if prompt_suffix else rows), texts
