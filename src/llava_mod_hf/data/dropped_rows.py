"""The rows that are left out: each is written down with its reason, and too many of them stop the reading."""

import copy
import json
import logging
import os
from collections import Counter
from pathlib import Path

FILE = "dropped_rows.jsonl"

MAX_SHARE = 0.01  # as `DataArguments.max_bad_rows` has it

JUDGED_EVERY = 1000  # rows of a stream, whose end nobody may see

MALFORMED = "bad"  # the reason that `max_bad_rows` is about; see `fitting.REASONS` for the others

SHOWN = 3  # reasons that a message quotes

logger = logging.getLogger(__name__)


class DroppedRows:
    """
    Where dropped rows are written down, one JSON object a line: `dataset`, `row` (its number there), `kind` (`bad`,
    `too_long`, `unsupervised` or `ties`) and `reason`, a sentence.

    Args:
        path (`str` or `Path`, *optional*): of the file, which is there from the first such row on; `None` for none.
        max_share (`float`, *optional*, defaults to 0.01): of malformed rows among those that a reading has seen.
        writes (`bool`, *optional*, defaults to `True`): without it, another process that reads the same rows writes.
    """

    def __init__(self, path=None, *, max_share=MAX_SHARE, writes=True):
        self.path = None if path is None else Path(path)
        self.max_share, self.writes, self.dataset = max_share, writes, "rows"
        self._readings: list[Reading] = []
        if self.path is not None and writes and self.path.is_file():  # what an earlier start has written is read again
            self.path.unlink()

    def of(self, dataset):
        """[`DroppedRows`]: the same, of rows that are one data set, by its name; a mixture has the names of its own."""
        named = copy.copy(self)
        named.dataset = dataset
        return named

    def reading(self, dataset):
        """[`Reading`] of a data set by one of those that leave rows out; each has its own share."""
        self._readings.append(Reading(self, dataset))
        return self._readings[-1]

    def judge(self):
        """[`Reading.judge`] of all readings in this process: for the end of a stream."""
        for reading in self._readings:
            reading.judge()

    def write(self, lines):
        """Adds lines to the file; each is whole, also where several workers write."""
        if self.path is None or not self.writes or not lines:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                for line in lines:
                    file.write(json.dumps(line, ensure_ascii=True).encode() + b"\n")
        except OSError as error:
            raise OSError(
                f"`{self.path}` could not be written ({error}): make room for it, or mend the rows that would be left "
                "out."
            ) from error

    def counts(self):
        """`dict[str, int]`: lines of the file by their `kind`, from workers and other starts of a reading too."""
        if self.path is None or not self.path.is_file():
            return {}
        with self.path.open(encoding="utf-8") as file:
            return dict(Counter(json.loads(line)["kind"] for line in file))


class Reading:
    """
    One pass over the rows of a data set, or several of the same rows.

    Args:
        dropped ([`DroppedRows`]): what the rows are written into.
        dataset (`str`): its name.
    """

    def __init__(self, dropped, dataset):
        self.dropped, self.dataset = dropped, dataset
        self.seen = self.bad = 0
        self.first: list[str] = []  # reasons
        self._furthest = self._last = -1
        self._process = None  # that has come so far
        self._noted = False  # whether the last row's number was

    def note(self, rows):
        """
        Takes in rows, in order.

        Args:
            rows (`Iterable[tuple[int, str | None, str | None]]`):
                Their numbers in the data set, and of a dropped one its kind and reason. Rows of one number that follow
                each other are answers of one conversation, and count once.
        """
        lines = []
        for number, kind, reason in rows:
            if number != self._last:
                self.seen += 1
                self._last, self._noted = number, False
            if kind is None or self._noted:
                continue
            self._noted = True
            lines.append({"dataset": self.dataset, "row": number, "kind": kind, "reason": reason})
            if kind == MALFORMED:
                self.bad += 1
                self.first += [reason] if len(self.first) < SHOWN else []
        self.dropped.write(lines)

    def note_streamed(self, place, number, kind, reason):
        """
        Takes in one row of a stream, which may be read again and again, and has no end that is seen.

        Args:
            place (`int`): in the stream; one that was there before says nothing new.
            number, kind, reason: as for [`note`].

        Returns:
            `bool`: whether it is a dropped row that was not noted before.

        Raises:
            ValueError: as [`judge`], after every 1,000 rows, and in a worker of a data loader when it begins anew.
        """
        if place <= self._furthest:
            # who trains looks at the first rows before, but not in a worker, which begins with what was seen there
            if place == 0 and self._process == os.getpid() and _in_worker():
                self.judge()
            return False
        self._furthest, self._process = place, os.getpid()
        before = self.seen
        self.note([(number, kind, reason)])
        if self.seen > before and self.seen % JUDGED_EVERY == 0:
            self.judge()
        return kind is not None

    def judge(self):
        """
        Raises:
            ValueError: if more than `max_share` of the rows that were seen are malformed.
        """
        if self.bad > self.dropped.max_share * self.seen:
            place = "" if self.dropped.path is None else f"; `{self.dropped.path}` names all"
            raise ValueError(
                f"{self.bad} of {self.seen} rows of `{self.dataset}` cannot be used ({self.bad / self.seen:.2%}), and "
                f"`max_bad_rows` is {self.dropped.max_share:g}: mend them, or allow more{place}; first: "
                f"{' '.join(self.first)}"
            )


def _in_worker():
    from torch.utils.data import get_worker_info  # only here: `--help` reads this file, and need not wait for it

    return get_worker_info() is not None
