"""What figure and page show of the JSON files of `bench.py`: which rows, their floors and their rivals."""

from typing import NamedTuple

# whose way a rival is
KINDS = {"trl": "TRL", "authors": "the authors' way", "transformers": "transformers", "plain": "the plain way"}


class Thing(NamedTuple):
    """A line of the figure: a row of a result, the ratio that is its floor, and `{ratio: (kind, what it is)}`."""

    result: str
    row: str
    says: str
    floor: tuple | None  # ratio, what it is
    rivals: dict


TIME = [
    Thing("startup", "llava-mod --help", "`llava-mod --help`", ("python -c pass", "an empty Python"),
          {"trl --help": ("trl", "`trl --help`")}),
    Thing("startup", "llava-mod mimic --help", "a stage's `--help`", ("import transformers", "`import transformers`"),
          {"trl sft --help": ("trl", "`trl sft --help`")}),
    Thing("mimic_loss", "ours", "mimic loss", ("floor", "matrix products"),
          {"trl_response": ("trl", "TRL's kernel on the response"), "authors": ("authors", "the authors' formula"),
           "selection": ("plain", "plain autograd on the supervised rows")}),
    Thing("mimic_step_0.5b", "live", "mimic step, 0.5B, live teacher", ("floor", "matrix products"),
          {"authors": ("authors", "the authors' step")}),
    Thing("mimic_step_0.5b", "cached", "mimic step, 0.5B, cached", ("floor", "matrix products"),
          {"authors": ("authors", "the authors' step")}),
    Thing("mimic_step_0.5b", "both", "mimic step, 0.5B, features cached too", ("floor", "matrix products"),
          {"authors": ("authors", "the authors' step")}),
    Thing("mimic_step_tiny", "live", "mimic step, tiny, live teacher", ("floor", "matrix products"),
          {"authors": ("authors", "the authors' step")}),
    Thing("mimic_step_tiny", "cached", "mimic step, tiny, cached", ("floor", "matrix products"),
          {"authors": ("authors", "the authors' step")}),
    Thing("preference_step", "live", "preference step, live teacher", ("floor", "the student's step alone"),
          {"trl": ("trl", "TRL's `DPOTrainer`")}),
    Thing("preference_step", "precomputed", "preference step, cached", ("floor", "the student's step alone"),
          {"trl": ("trl", "TRL's `DPOTrainer`")}),
    Thing("preference_prefix", "shared", "pair with one prompt", ("floor", "matrix products"),
          {"two sequences": ("trl", "two sequences, as TRL has them")}),
    Thing("moe_block", "ours, 704 tokens", "experts, 704 tokens", ("floor", "a dense FFN"),
          {"grouped_mm": ("transformers", "its `grouped_mm`"), "eager": ("authors", "a loop over experts")}),
    Thing("moe_block", "ours, 4096 tokens", "experts, 4,096 tokens", ("floor", "a dense FFN"),
          {"grouped_mm": ("transformers", "its `grouped_mm`"), "eager": ("authors", "a loop over experts")}),
    Thing("moe_block", "ours, 1 tokens", "experts, one token", ("floor", "a dense FFN"),
          {"grouped_mm": ("transformers", "its `grouped_mm`"), "eager": ("authors", "a loop over experts")}),
    Thing("decoding", "sparse student", "decoding a token", ("floor", "reading each active weight"),
          {"dense, as many active": ("plain", "a dense student of as many active parameters")}),
    Thing("pictures_encoded", "4 of 8 different", "8 pictures, 4 different", ("floor", "the 4 alone"),
          {"as often as they come": ("authors", "each as often as it comes")}),
    Thing("data_loading", "rows", "pictures to batches", ("floor", "read, decode, scale"),
          {"trl": ("trl", "TRL's collator")}),
    Thing("data_loading", "a stream", "pictures to batches, a stream", ("floor", "read, decode, scale"),
          {"trl": ("trl", "TRL's collator")}),
    Thing("teacher_cache", "top 32: read", "reading a teacher's cache", ("floor", "reading the files"),
          {"live": ("plain", "the teacher itself")}),
    Thing("load_memory", "student", "loading a student", ("floor", "reading the file"),
          {"mixtral": ("transformers", "its Mixtral of the same sizes")}),
]  # fmt: skip

SIZE = [
    Thing("mimic_loss", "ours: peak memory", "mimic loss, memory", ("floor", "matrix products"),
          {"trl_response": ("trl", "TRL's kernel on the response"), "authors": ("authors", "the authors' formula"),
           "selection": ("plain", "plain autograd on the supervised rows")}),
    Thing("preference_step", "live: peak memory", "preference step, memory", ("floor", "the student's step alone"),
          {"trl": ("trl", "TRL's `DPOTrainer`")}),
    Thing("preference_prefix", "shared: peak memory", "pair with one prompt, memory", None,
          {"two sequences": ("trl", "two sequences, as TRL has them")}),
    Thing("load_memory", "student: anonymous", "loading, memory of its own", ("floor", "the file"),
          {"mixtral": ("transformers", "its Mixtral of the same sizes")}),
    Thing("streaming_memory", "2000 rows: peak memory", "a stream of 2,000 rows, memory", ("floor", "before the first"),
          {"whole": ("plain", "all rows at once")}),
    Thing("streaming_memory", "20000 rows: peak memory", "a stream of 20,000 rows, memory",
          ("floor", "before the first"), {}),
    Thing("teacher_cache", "top 32: size", "a teacher's cache, bytes", None,
          {"all": ("plain", "all log-probabilities in float16")}),
    Thing("padding", "max_tokens_per_batch", "tokens of padded batches", ("floor", "no padding"),
          {"group_by_length": ("transformers", "`group_by_length`")}),
    Thing("multi_turn", "whole", "tokens of conversations", None, {"authors": ("authors", "the authors' one pass")}),
]  # fmt: skip


def shown(results, things):
    """`[(Thing, row)]` of those that have been measured."""
    found = []
    for thing in things:
        rows = {row["name"]: row for row in results.get(thing.result, {"rows": []})["rows"]}
        if thing.row in rows:
            found.append((thing, rows[thing.row]))
    return found


def over_floor(thing, row):
    """`(value, low, high)` of what it takes over its floor, or `None`."""
    ratio = row["ratios"].get(thing.floor[0]) if thing.floor else None
    return ratio and (ratio["value"], ratio["low"], ratio["high"])


def against(thing, row):
    """`{ratio: (value, low, high)}`: how many times as much each rival takes."""
    ratios = {name: row["ratios"][name] for name in thing.rivals if name in row["ratios"]}
    return {name: (1 / each["value"], 1 / each["high"], 1 / each["low"]) for name, each in ratios.items()}
