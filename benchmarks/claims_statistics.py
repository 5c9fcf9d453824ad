"""Figures of the answers in a folder, and how sure a mean over seeds is."""

import functools
import json
import math
import statistics
from pathlib import Path

from llava_mod_hf.evaluation.intervals import figures

# 97.5 % quantiles of Student's t with 1, 2, … degrees of freedom
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093,
)  # fmt: skip


def read_answers(folder):
    """`list[dict]`: `question`, `answer`, `kind` and `given` of each row."""
    columns = json.loads(Path(folder, "answers.json").read_text(encoding="utf-8"))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@functools.cache
def figures_of(folder):
    """The figures of the answers in a folder, which is read once: a plan asks for them after every command."""
    return figures(read_answers(folder))


def interval(values):
    """Mean and 95 % interval of the mean over seeds, by Student's t: `(mean, low, high)`."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = T_QUANTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def percent(values, sign=""):
    """`str`: mean ± half width of its interval, in per cent; `sign="+"` always writes one."""
    mean, low, _ = interval(values)
    width = f" ± {100 * (mean - low):.1f}" if len(values) > 1 else ""
    return f"{100 * mean:{sign}.1f}{width}"
