"""`llava-mod evaluate`: measure answers and hallucination."""

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from llava_mod_hf.commands.parts import unmarked, written_down
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.evaluation.answers import evaluate_blind, evaluate_model
from llava_mod_hf.evaluation.expert_load import expert_load
from llava_mod_hf.evaluation.questions import KIND, with_questions
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.publishing.provenance import RESULTS_FILE
from llava_mod_hf.teachers.divergence import kl_to_live_teacher
from llava_mod_hf.training.run_folder import write_json

OPTIONS = ("data.arguments:DataArguments", "commands.evaluate:EvaluateCommand")

NEEDED = ("prompt", "completion")

logger = logging.getLogger(__name__)


@dataclass
class EvaluateCommand:
    """
    Args:
        model (`str`): the LLaVA to measure.
        teacher (`str`, *optional*): measured as well, and what `kl_to_teacher` compares with.
        output_file (`str`, *optional*): by default `results.json` in the model's folder, where `publish` looks.
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
    train_dataset_name: str | None = None
    batch_size: int = 128
    dtype: str = "float32"
    teacher_dtype: str = "float32"
    device: str | None = None
    seed: int = 0
    trust_remote_code: bool = False

    def load(self, name, dtype):
        """A model, where it answers, and its processor."""
        model, processor = load_model_and_processor(
            name, dtype=dtype, device=self.device, trust_remote_code=self.trust_remote_code
        )
        return (model.to(PartialState().device) if self.device is None else model), processor


def run(data_args: DataArguments, args: EvaluateCommand):
    """
    Measures a model, its teacher and the blind baseline on the same test questions.

    Returns:
        `dict`: `student`, `teacher`, `blind`, `dataset`, `num_questions`; also written to the results file.
    """
    output_file = Path(args.output_file or Path(args.model) / RESULTS_FILE)
    if not output_file.parent.is_dir():
        raise ValueError(f"`{output_file.parent}` is no folder to write the results to: give `output_file`.")
    if data_args.dataset_name is None:
        raise ValueError("`datasets` are several, and measures are of one: give `dataset_name`, one after the other.")
    training_name = args.train_dataset_name or data_args.dataset_name
    if Path(training_name).is_file() and Path(training_name).resolve() == Path(data_args.dataset_name).resolve():
        raise ValueError(
            f"`{training_name}` is one file, without splits: the blind baseline would learn the answers that it is "
            "measured by. Give the file of the training questions as `train_dataset_name`."
        )
    if data_args.streaming:
        raise ValueError("`streaming` is true, and measures are of all rows: leave it out.")
    dropped = written_down(data_args, output_file.with_suffix(""))
    options = {"columns": NEEDED, "seed": args.seed, "dropped": dropped}
    rows = load_rows(data_args, split=data_args.dataset_test_split, **options)
    has_kinds = KIND in rows.column_names
    rows = with_questions(rows)
    all_rows = dataclasses.replace(data_args, dataset_name=training_name, max_samples=None)
    if training_name != data_args.dataset_name:
        all_rows.dataset_options = None  # which are of the test's data set
    training = with_questions(load_rows(all_rows, **options).remove_columns("images"))
    model, processor = args.load(args.model, args.dtype)
    rows = unmarked(rows, processor, data_args, dropped, NEEDED)
    teacher_results = divergence = None
    if args.teacher:
        teacher, teacher_processor = args.load(args.teacher, args.teacher_dtype)
        rows = unmarked(rows, teacher_processor, data_args, dropped, NEEDED)
        teacher_results = evaluate_model(teacher, teacher_processor, rows, batch_size=args.batch_size)
        divergence = kl_to_live_teacher(model, processor, teacher, teacher_processor, rows, batch_size=args.batch_size)
    results = {
        "student": {**evaluate_model(model, processor, rows, batch_size=args.batch_size), "kl_to_teacher": divergence},
        "teacher": teacher_results,
        "blind": evaluate_blind(training, rows),
        "dataset": data_args.dataset_name,
        "expert_load": expert_load(model, processor, rows.select(range(min(len(rows), 512)))),
        "num_questions": len(rows),
    }
    if not has_kinds:
        for measured in filter(None, (results["student"], teacher_results, results["blind"])):
            del measured["exact_match_by_kind"]
    write_json(output_file, results)
    logger.warning("Exact match %.3f; everything is in `%s`.", results["student"]["exact_match"], output_file)
    return results
