"""Rows that cannot be used: marked while a data set is read, left out before anybody sees them."""

import logging

import numpy as np
from datasets import IterableDataset

from llava_mod_hf.data.dropped_rows import MALFORMED, SHOWN
from llava_mod_hf.data.images import filter_undecoded

PROBLEM = "problem"  # column: why a row is to be left out

BATCH = 10_000  # rows whose reasons are in memory at a time

logger = logging.getLogger(__name__)


def without_problems(dataset, reading):
    """
    Leaves out the rows that have a problem, and says which.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): may have the column `problem`.
        reading ([`~llava_mod_hf.data.dropped_rows.Reading`]): what they are written down by.

    Returns:
        The same without that column.

    Raises:
        ValueError: if more have one than may have.
    """
    if PROBLEM not in dataset.column_names:
        return dataset
    names = [name for name in (PROBLEM, "source_row") if name in dataset.column_names]
    if isinstance(dataset, IterableDataset):

        def keep(problem, *columns):
            *number, place = columns
            kind = None if problem is None else MALFORMED
            new = reading.note_streamed(place, number[0] if number else place, kind, problem)
            if new and reading.bad <= SHOWN:
                logger.warning("Left out a row. %s", problem)
            return problem is None

        return filter_undecoded(dataset, keep, input_columns=names, with_indices=True).remove_columns(PROBLEM)
    kept = []
    for start in range(0, len(dataset), BATCH):
        columns = dataset.select_columns(names)[start : start + BATCH]
        problems = columns[PROBLEM]
        numbers = columns.get("source_row") or range(start, start + len(problems))
        reading.note((n, None if p is None else MALFORMED, p) for n, p in zip(numbers, problems, strict=True))
        kept.append(start + np.flatnonzero([problem is None for problem in problems]))
    kept = np.concatenate([np.empty(0, dtype=int), *kept])
    if reading.bad:
        logger.warning("Left out %d of %d rows, first: %s", reading.bad, reading.seen, " ".join(reading.first))
        reading.judge()
        dataset = dataset.select(kept)
    return dataset.remove_columns(PROBLEM)
