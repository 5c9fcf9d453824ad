"""`llava-mod evaluate`: measure answers and hallucination, by the benchmarks' measures too."""

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from llava_mod_hf.commands.judge_options import JudgeArguments, judge_of, unasked
from llava_mod_hf.commands.stage_parts import unmarked, written_down
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.evaluation.answer_file import answers_for, answers_path, ask
from llava_mod_hf.evaluation.answers import blind_answers, evaluate_model, score_answers
from llava_mod_hf.evaluation.asked_rows import asked_rows
from llava_mod_hf.evaluation.benchmarks import BENCHMARKS, check_names, measure, units
from llava_mod_hf.evaluation.metrics.synonyms import Synonyms
from llava_mod_hf.evaluation.questions import KIND, with_questions
from llava_mod_hf.evaluation.router_use import loads_of, router_use, sample
from llava_mod_hf.evaluation.setup import identity_of, setup_of
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.publishing.provenance import RESULTS_FILE
from llava_mod_hf.teachers.divergence import kl_to_live_teacher
from llava_mod_hf.training.output_folder import write_json

OPTIONS = (
    "data.arguments:DataArguments",
    "commands.evaluate:EvaluateCommand",
    "commands.judge_options:JudgeArguments",
)

NEEDED = ("prompt", "completion")

PLACE = "_place"  # of a row among those whose texts are known; a data set may have a column `place`

logger = logging.getLogger(__name__)


@dataclass
class EvaluateCommand:
    """
    Args:
        model (`str`): the LLaVA to measure.
        teacher (`str`, *optional*): measured as well, and what `kl_to_teacher` compares with.
        output_file (`str`, *optional*): by default `results.json` in the model's folder, where `publish` looks. The
            answers are beside it, in `results.answers.jsonl` and `results.teacher_answers.jsonl`; those that are there
            of the same model, prompt and picture are not asked for again.
        measures (`list[str]`, *optional*): of [`~llava_mod_hf.evaluation.benchmarks.BENCHMARKS`], with intervals.
        against (`str`, *optional*): results or answers of another model to the same rows, which `measures` are compared
            with, pair by pair.
        synonyms (`str`, *optional*): your copy of CHAIR's `synonyms.txt`, for `chair` and `object_halbench`; without it
            things are the kinds of `embedded:scenes`.
        prompt_suffix (`str`, *optional*): put below every question, such as how to answer.
        max_new_tokens (`int`, *optional*, defaults to 64): where an answer without an end is cut.
        blind (`bool`, *optional*, defaults to `True`): whether the blind baseline is measured too, which takes training
            rows that a benchmark may not have.
        train_dataset_name (`str`, *optional*):
            Where the blind baseline learns the most frequent answers; by default the train split of `dataset_name`. A
            single file has no splits, so that the baseline would learn the test's answers: there it has to be given.
        batch_size (`int`, *optional*, defaults to 128): questions answered at a time.
        dtype (`str`, *optional*, defaults to `"float32"`): of the model's weights in memory.
        teacher_dtype (`str`, *optional*, defaults to `"float32"`): of the teacher's.
        device (`str`, *optional*): where both go, as transformers' `device_map`; by default a GPU if there is one.
        seed (`int`, *optional*, defaults to 0): of the test questions' balancing.
        trust_remote_code (`bool`, *optional*, defaults to `False`).
    """

    model: str = field(metadata={"help": "the LLaVA to measure"})
    teacher: str | None = None
    output_file: str | None = None
    measures: list[str] = field(default_factory=list, metadata={"help": "benchmarks' measures: docs/judging.md"})
    against: str | None = None
    synonyms: str | None = None
    prompt_suffix: str | None = None
    max_new_tokens: int = 64
    blind: bool = True
    train_dataset_name: str | None = None
    batch_size: int = 128
    dtype: str = "float32"
    teacher_dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self):
        self.measures = [self.measures] if isinstance(self.measures, str) else list(self.measures or ())
        check_names(self.measures)
        if self.against is not None and not self.measures:
            raise ValueError(f"`against` is `{self.against}`, and no `measures` are given to compare: give both.")
        if self.synonyms is not None and not any("synonyms" in BENCHMARKS[name].options for name in self.measures):
            known = ", ".join(name for name, each in BENCHMARKS.items() if "synonyms" in each.options)
            raise ValueError(f"`synonyms` is `{self.synonyms}`, which does nothing without a measure of {known}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` is {self.max_new_tokens}: give at least 1.")
        if not self.blind and self.train_dataset_name is not None:
            raise ValueError(
                f"`train_dataset_name` is `{self.train_dataset_name}`, where the blind baseline learns, and `blind` is "
                "false: give one of them."
            )

    def load(self, name, dtype):
        """A model, where it answers, and its processor."""
        model, processor = load_model_and_processor(
            name, dtype=dtype, device=self.device, trust_remote_code=self.trust_remote_code
        )
        return (model.to(PartialState().device) if self.device is None else model), processor


def run(data_args: DataArguments, args: EvaluateCommand, judge_args: JudgeArguments):
    """
    Measures a model, its teacher and the blind baseline on the same test questions.

    Returns:
        `dict`: `student`, `teacher`, `blind`, `dataset`, `num_questions`, and how it was measured, `setup`; with
        `measures` each of the first three has them, and with `against` there are differences. It is also written to the
        results file.
    """
    output_file = Path(args.output_file or Path(args.model) / RESULTS_FILE)
    if not output_file.parent.is_dir():
        raise ValueError(f"`{output_file.parent}` is no folder to write the results to: give `output_file`.")
    if data_args.dataset_name is None:
        raise ValueError("`datasets` are several, and measures are of one: give `dataset_name`, one after the other.")
    if data_args.streaming:
        raise ValueError("`streaming` is true, and measures are of all rows: leave it out.")
    needed = {
        "synonyms": Synonyms.read(args.synonyms) if args.synonyms else None,
        "judge": judge_args.make(args.measures, output_file, args.device),
    }
    dropped = written_down(data_args, output_file.with_suffix(""))
    options = {"columns": NEEDED, "seed": args.seed, "dropped": dropped}
    training = _training_rows(data_args, args, options)
    rows = load_rows(data_args, split=data_args.dataset_test_split, **options)
    has_kinds = KIND in rows.column_names
    rows, texts = asked_rows(rows, data_args, measures=args.measures, prompt_suffix=args.prompt_suffix)
    rows = rows.add_column(PLACE, list(range(len(rows))))
    for name in args.measures:  # before hours of answers
        units(name, texts, [""] * len(texts), **{**needed, "judge": unasked})
    model, processor = args.load(args.model, args.dtype)
    rows = unmarked(rows, processor, data_args, dropped, NEEDED)
    teacher_results = divergence = None
    if args.teacher:
        teacher, teacher_processor = args.load(args.teacher, args.teacher_dtype)
        rows = unmarked(rows, teacher_processor, data_args, dropped, NEEDED)
    texts = [texts[place] for place in rows[PLACE]]
    others = None if args.against is None else answers_for(args.against, rows)

    def measured(scores, given):
        if not has_kinds:
            del scores["exact_match_by_kind"]
        found = measure(args.measures, texts, given, **needed)
        return {**scores, "measures": found} if found else scores

    def answered(role, model, processor):
        given = ask(
            model,
            processor,
            rows,
            texts,
            path=answers_path(output_file, role),
            identity=identity_of(model, processor, args.max_new_tokens),
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
        )
        return given, measured(evaluate_model(model, processor, rows, answers=given), given)

    if args.teacher:
        _, teacher_results = answered("teacher_", teacher, teacher_processor)
        divergence = kl_to_live_teacher(model, processor, teacher, teacher_processor, rows, batch_size=args.batch_size)
    given, student_results = answered("", model, processor)
    blind = None if training is None else blind_answers(training, rows)
    sampled = sample(rows)
    used = router_use(model, processor, sampled, tasks=sampled[KIND])
    results = {
        "student": {**student_results, "kl_to_teacher": divergence},
        "teacher": teacher_results,
        "blind": None if blind is None else measured(score_answers(blind, rows), blind),
        "dataset": data_args.dataset_name,
        "expert_load": loads_of(used),
        "routers": used,
        "num_questions": len(rows),
        "setup": setup_of(model, processor, rows, data_args, args) | judge_of(needed["judge"]),
    }
    if others is not None:
        compared = measure(args.measures, texts, given, others, **needed)
        results["against"] = {"answers": args.against, "measures": compared}
    write_json(output_file, results)
    logger.warning("Exact match %.3f; everything is in `%s`.", results["student"]["exact_match"], output_file)
    return results


def _training_rows(data_args, args, options):
    """Rows that the blind baseline learns from, or `None` without it."""
    if not args.blind:
        return None
    training_name = args.train_dataset_name or data_args.dataset_name
    if Path(training_name).is_file() and Path(training_name).resolve() == Path(data_args.dataset_name).resolve():
        raise ValueError(
            f"`{training_name}` is one file, without splits: the blind baseline would learn the answers that it is "
            "measured by. Give the file of the training questions as `train_dataset_name`, or `blind: false`."
        )
    all_rows = dataclasses.replace(data_args, dataset_name=training_name, max_samples=None)
    if training_name != data_args.dataset_name:
        all_rows.dataset_options = None  # which are of the test's data set
    return with_questions(load_rows(all_rows, **options).remove_columns("images"))
