"""Rows that cannot be used: marked while a data set is read, left out before anybody sees them."""

import logging

from datasets import IterableDataset

PROBLEM = "problem"  # column: why a row is to be left out

logger = logging.getLogger(__name__)


def without_problems(dataset):
    """
    Leaves out the rows that have a problem, and says which.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): may have the column `problem`.

    Returns:
        The same without that column.
    """
    if PROBLEM not in dataset.column_names:
        return dataset
    if isinstance(dataset, IterableDataset):

        def keep(problem):
            if problem is not None:
                logger.warning("Left out a row. %s", problem)
            return problem is None

        return dataset.filter(keep, input_columns=[PROBLEM]).remove_columns(PROBLEM)
    problems = dataset[PROBLEM][:]
    found = [problem for problem in problems if problem is not None]
    if found:
        logger.warning("Left out %d of %d rows, first: %s", len(found), len(problems), " ".join(found[:3]))
        dataset = dataset.select([index for index, problem in enumerate(problems) if problem is None])
    return dataset.remove_columns(PROBLEM)
