"""Rows that spell out a mark are left out."""

import logging

from llava_mod_hf.data.dropped_rows import MALFORMED, DroppedRows
from llava_mod_hf.data.marks import check_marks, marks_of
from llava_mod_hf.data.mixture import Readings, row_names

logger = logging.getLogger(__name__)


def leave_out_marked(rows, processor, *, columns=("prompt",), bad_rows="error", dropped=None):
    """
    Rows whose texts spell out no mark, for those that do not go through
    [`~llava_mod_hf.data.fitting.fit_rows`], which does the same.

    Args:
        rows (`datasets.Dataset`): of messages, or of texts that have been through a template, which hold marks rightly.
        processor (`ProcessorMixin`): who reads them.
        columns (`tuple[str]`, *optional*): what is read of them.
        bad_rows (`str`, *optional*, defaults to `"error"`): `"drop"` leaves such a row out, with a warning.
        dropped ([`~llava_mod_hf.data.dropped_rows.DroppedRows`], *optional*): where it is written down.

    Returns:
        `datasets.Dataset`.

    Raises:
        ValueError: naming the row and the mark, or if no row is left, or more are left out than may be.
    """
    marks = marks_of(processor)
    readings = Readings(rows, DroppedRows() if dropped is None else dropped)
    known, kept, first = readings.known(rows, range(len(rows))), [], None
    for place, (where, *texts) in enumerate(zip(row_names(rows), *(rows[column] for column in columns), strict=True)):
        problem = None
        try:
            for messages in texts:
                if not isinstance(messages, str):
                    check_marks(messages, marks, where)
            kept.append(place)
        except ValueError as error:
            if bad_rows == "error":
                raise
            problem = str(error)
            first = first or problem
        readings.note(place, known[place], None if problem is None else MALFORMED, problem)
    if first is None:
        return rows
    if not kept:
        raise ValueError(f"Each of the {len(rows)} prompts holds a mark, first: {first}")
    logger.warning("Left out %d of %d rows, first: %s", len(rows) - len(kept), len(rows), first)
    readings.judge()
    return rows.select(kept)
