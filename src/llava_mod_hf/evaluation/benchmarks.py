"""The benchmarks' measures: which columns of a row each one reads, and its figures with their intervals."""

from collections.abc import Callable
from typing import NamedTuple

from llava_mod_hf.evaluation.intervals import intervals_of, paired_test
from llava_mod_hf.evaluation.metrics.anls import Anls
from llava_mod_hf.evaluation.metrics.chair import Chair, ObjectHalBench
from llava_mod_hf.evaluation.metrics.exact_match import ExactMatch
from llava_mod_hf.evaluation.metrics.mmhal import PROMPT, Mmhal
from llava_mod_hf.evaluation.metrics.multiple_choice import MultipleChoice
from llava_mod_hf.evaluation.metrics.pope import PopeBenchmark
from llava_mod_hf.evaluation.metrics.relaxed_match import RelaxedMatch
from llava_mod_hf.evaluation.metrics.vqa_accuracy import VqaAccuracy
from llava_mod_hf.evaluation.rotations import GROUP, OPTIONS, rotate


class Benchmark(NamedTuple):
    """
    A measure that is asked for by name, `--measures`.

    Args:
        metric (`type`): a [`~llava_mod_hf.evaluation.metrics.ratios.RatioMetric`].
        read (`Callable[[dict], tuple]`): a row, with `question`, `answer`, `kind` and all other columns of the data
            set → the metric's inputs but the predictions. It raises a `KeyError` of the column that is missing.
        prepare (`Callable`, *optional*): rows (`datasets.Dataset`) and their texts → those that are asked instead.
        options (`tuple[str, ...]`, *optional*): what the metric takes besides: `synonyms`.
        judged (`Callable[[dict, str], tuple]`, *optional*): of a measure whose last input is a judge's verdict: a row
            and an answer → what fills in the judge's prompt. It raises a `KeyError` as `read` does.
        prompt (`str`, *optional*): that prompt.
    """

    metric: type
    read: Callable
    prepare: Callable | None = None
    options: tuple = ()
    judged: Callable | None = None
    prompt: str | None = None


def answers_of(row):
    """The answers that count as right: `answers`, texts or `{"answer": text}`, or else the one `answer`."""
    answers = row.get("answers") or [row["answer"]]
    return [answer["answer"] if isinstance(answer, dict) else answer for answer in answers]


def _annotators(row):
    return (answers_of({"answers": row["answers"], "answer": ""}),)


def _things(row):
    """What is there: the annotated `objects` and `captions`, or else what the answer names."""
    return ([*(row.get("objects") or ()), *(row.get("captions") or ())] or [row["answer"]],)


def _mmhal(row, answer):
    """What is in the picture, where that is known, the question, the reference and the answer."""
    shows = row.get("image_content") or row.get("objects") or []
    return (
        ", ".join([shows] if isinstance(shows, str) else shows) or "(no list)",
        row["question"],
        row["answer"],
        answer,
    )


BENCHMARKS = {
    "exact_match": Benchmark(ExactMatch, lambda row: (answers_of(row),)),
    "vqa_accuracy": Benchmark(VqaAccuracy, _annotators),
    "relaxed_match": Benchmark(RelaxedMatch, lambda row: (answers_of(row),)),
    "anls": Benchmark(Anls, lambda row: (answers_of(row),)),
    "multiple_choice": Benchmark(
        MultipleChoice, lambda row: (row["answer"], row[OPTIONS], str(row[GROUP])), prepare=rotate
    ),
    "pope": Benchmark(PopeBenchmark, lambda row: (row["answer"], row.get("category") or row["kind"])),
    "chair": Benchmark(Chair, _things, options=("synonyms",)),
    "object_halbench": Benchmark(ObjectHalBench, _things, options=("synonyms",)),
    "mmhal": Benchmark(Mmhal, lambda row: (row.get("question_type") or row["kind"],), judged=_mmhal, prompt=PROMPT),
}


def register_benchmark(name, benchmark):
    """
    Adds a measure that `--measures` then takes by its name.

    Args:
        name (`str`).
        benchmark ([`Benchmark`]).

    Raises:
        ValueError: if there is one of that name.
    """
    if name in BENCHMARKS:
        raise ValueError(f"There is a measure `{name}` already: give another name.")
    BENCHMARKS[name] = benchmark


def check_names(names):
    """
    Raises:
        ValueError: if a name is no measure's or comes twice, or two measures ask the rows in ways of their own.
    """
    for place, name in enumerate(names):
        if name not in BENCHMARKS:
            raise ValueError(f"`measures` names `{name}`, which there is not: give some of {', '.join(BENCHMARKS)}.")
        if name in names[:place]:
            raise ValueError(f"`measures` names `{name}` twice: once is enough.")
    asking = [name for name in names if BENCHMARKS[name].prepare]
    if asking and len(names) > 1:
        raise ValueError(
            f"`measures` are {', '.join(names)}, and `{asking[0]}` asks the questions in a way of its own: measure the "
            "others by a run of their own."
        )


def prepared(rows, texts, names):
    """
    What is asked for some measures: of one that asks in a way of its own, other rows than the data set's.

    Args:
        rows (`datasets.Dataset`), texts (`list[dict]`): as [`~llava_mod_hf.evaluation.questions.row_texts`] has them.
        names (`list[str]`): of [`BENCHMARKS`].

    Returns:
        `tuple`: rows and texts.
    """
    for name in names:
        if BENCHMARKS[name].prepare:
            rows, texts = BENCHMARKS[name].prepare(rows, texts)
    return rows, texts


def counted(name, rows, given, **options):
    """
    What each row, or rows that belong together, add to the figures of a measure; nothing, where it is not of the rows.

    Args:
        name (`str`): of [`BENCHMARKS`].
        rows (`list[dict]`): with all their columns but the pictures.
        given (`list[str]`): an answer to each.
        options: of the metric, those that it takes; `judge` of one that is judged, as
            [`~llava_mod_hf.evaluation.verdict_file.Verdicts`].

    Raises:
        ValueError: if a row has not what the measure reads.
    """
    benchmark = BENCHMARKS[name]
    metric = benchmark.metric(keep_in_memory=True)
    inputs, filled = {key: [] for key in metric.inputs}, []
    for number, (row, answer) in enumerate(zip(rows, given, strict=True)):
        try:
            values = (answer, *benchmark.read(row))
            if benchmark.judged:
                filled.append(benchmark.judged(row, answer))
        except KeyError as error:
            raise ValueError(
                f"Row {number} has no `{error.args[0]}`, which the measure `{name}` reads: docs/judging.md says what "
                "for."
            ) from error
        for key, value in zip(metric.inputs, values, strict=not benchmark.judged):
            if not (isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))):
                raise ValueError(
                    f"Row {number} gives the measure `{name}` {value!r:.80} for its {key}: give texts, as "
                    "docs/judging.md says."
                )
            inputs[key].append(value)
    if benchmark.judged:
        inputs[metric.inputs[-1]] = options["judge"](benchmark.prompt, filled)
    return metric.units(inputs=inputs, **{key: options[key] for key in benchmark.options})


def units(name, rows, given, **options):
    """
    [`counted`] of rows of which at least one is of the measure.

    Raises:
        ValueError: as [`counted`], and if none is.
    """
    found = counted(name, rows, given, **options)
    if not any(found):
        raise ValueError(f"None of {len(rows)} rows is of the measure `{name}`: docs/judging.md says which are.")
    return found


def measure(names, rows, given, against=None, **options):
    """
    The figures of some measures.

    Args:
        names (`list[str]`), rows (`list[dict]`), given (`list[str]`), options: as in [`units`].
        against (`list[str]`, *optional*): another model's answers to the same rows.

    Returns:
        `dict`: by measure and figure `value`, `low` and `high`, the ends of its 95 % interval; with `against`
        `difference` (this model's less the other's) and `p` of a paired test instead of `value`.
    """
    found = {}
    for name in names:
        own = units(name, rows, given, **options)
        others = None if against is None else units(name, rows, against, **options)
        keys = ("value" if against is None else "difference", "low", "high")
        found[name] = {
            figure: dict(zip(keys, values, strict=True)) for figure, values in intervals_of(own, others).items()
        }
        if others is not None:
            for figure, chance in paired_test(own, others).items():
                found[name][figure]["p"] = chance
    return found
