"""`llava-mod make-preferences`: several answers to a prompt, scored; the best and the worst become a pair."""

import importlib
import logging
from dataclasses import dataclass, field

from accelerate import PartialState
from datasets import Value
from torch.nn import functional as F
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from llava_mod_hf.commands.generate_completions import (
    GenerationArguments,
    PromptRows,
    dataset_of,
    load_prompts,
    shard_seed,
    write_answers,
)
from llava_mod_hf.commands.stage_parts import unmarked, written_down
from llava_mod_hf.data.arguments import PromptArguments
from llava_mod_hf.data.formats import check_answer, text_of
from llava_mod_hf.data.load import MESSAGES, image_root
from llava_mod_hf.data.marks import check_marks, find_mark, marks_of
from llava_mod_hf.data.mixture import row_names
from llava_mod_hf.evaluation.answers import sample_answers
from llava_mod_hf.evaluation.generating import evaluating, inputs_for
from llava_mod_hf.evaluation.measures import normalize_answer
from llava_mod_hf.losses.rows import shift_for_next_token

OPTIONS = ("data.arguments:PromptArguments", "commands.make_preferences:PairArguments")

logger = logging.getLogger(__name__)


@dataclass
class PairArguments(GenerationArguments):
    """
    [`GenerationArguments`] with what makes an answer better.

    Args:
        num_answers (`int`, *optional*, defaults to 4): sampled for each prompt.
        temperature (`float`, *optional*, defaults to 1.0): of the sampling; must be above 0.
        scorer (`str`, *optional*, defaults to `"teacher"`):
            `"teacher"`: the likelihood of the answer for `teacher`; `"answer"`: 1 if it equals the row's `answer`, or
            else its `completion`, but for capitals and a trailing period, 0 otherwise; `module:function`: called with
            a row (its images undecoded) and the list of its answers, returns a number for each.
        likelihood (`str`, *optional*, defaults to `"mean"`):
            Of an answer's log-probability, `"mean"` per token or `"sum"`, which prefers short answers.
        teacher (`str`, *optional*): the LLaVA whose likelihood scores.
    """

    temperature: float = 1.0
    num_answers: int = 4
    scorer: str = "teacher"
    likelihood: str = field(default="mean", metadata={"choices": ["mean", "sum"]})
    teacher: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.temperature == 0 or self.num_answers < 2:
            raise ValueError(
                f"`temperature` is {self.temperature} and `num_answers` {self.num_answers}: a pair needs two different "
                "answers, so sample at least 2 at a temperature above 0."
            )
        if self.likelihood not in ("mean", "sum"):
            raise ValueError(f"`likelihood` is {self.likelihood!r}: give mean or sum.")
        if self.scorer not in ("teacher", "answer") and ":" not in self.scorer:
            raise ValueError(f"`scorer` is {self.scorer!r}: give teacher, answer or `module:function`.")
        if self.scorer == "teacher" and self.teacher is None:
            raise ValueError("`scorer` is `teacher`, and there is no `teacher`: name the model that scores.")


def answer_log_probs(model, processor, examples, *, batch_size, reduction="mean"):
    """
    How likely a model finds answers: log p(y | x) = Σ_t log p(y_t | x, y_<t), the end token included.

    Args:
        model (`PreTrainedModel`), processor (`ProcessorMixin`): who judges, and how it reads.
        examples (`list[dict]`): `images` (PIL), `prompt` and `completion` (messages).
        batch_size (`int`): answers judged at a time.
        reduction (`str`, *optional*, defaults to `"mean"`): `"mean"` over the tokens, or `"sum"`.

    Returns:
        `list[float]`: one in nats per answer.

    Raises:
        ValueError: if a text spells out a mark ([`~llava_mod_hf.data.marks.marks_of`]).
    """
    marks = marks_of(processor)
    for number, example in enumerate(examples):
        check_marks([*example["prompt"], *example["completion"]], marks, f"Example {number}")
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    found = []
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            batch = collate([dict(example) for example in examples[start : start + batch_size]])
            keep, targets = shift_for_next_token(batch["labels"])  # (batch, sequence), (tokens,)
            logits = model(**inputs_for(model, batch), logits_to_keep=keep.to(model.device)).logits
            losses = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none").cpu()
            counts = keep.sum(1).tolist()
            for each in losses.split(counts):
                value = each.mean() if reduction == "mean" else each.sum()
                found.append(-value.item())
    return found


def load_scorer(name):
    """
    A user's function, by `module:function`.

    Raises:
        ValueError: if there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`scorer` is `{name}`, which cannot be imported ({error}): write `module:function`, with the module on "
            "Python's path."
        ) from error


def best_and_worst(answers, scores):
    """
    The pair of a prompt.

    Args:
        answers (`list[str]`): all different.
        scores (`list[float]`): of the answers.

    Returns:
        `tuple[int, int]` or `None`: places of the best and the worst, the first of equals; `None` without two answers
        of different score.
    """
    best, worst = (pick(range(len(scores)), key=scores.__getitem__, default=0) for pick in (max, min))
    return None if not answers or scores[best] == scores[worst] else (best, worst)


def right_answers(rows):
    """
    What the scorer `answer` compares with.

    Args:
        rows (`datasets.Dataset`): with an `answer`, or else a `completion`.

    Returns:
        `list[str]`.

    Raises:
        ValueError: if the rows have neither, or naming one whose answer is no text.
    """
    column = next((name for name in ("answer", "completion") if name in rows.column_names), None)
    if column is None:
        raise ValueError(
            "`scorer` is `answer`, and the rows have neither an `answer` nor a `completion` to compare with."
        )
    answers = []
    for where, answer in zip(row_names(rows), rows[column], strict=True):
        text = answer
        if column == "completion" and isinstance(answer, list):
            check_answer(answer, where)
            text = "".join(text_of(message["content"]) for message in answer)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{where}: the `{column}` is {answer!r:.80}: `scorer: answer` compares with a text; give one, or "
                "leave out the row."
            )
        answers.append(text)
    return answers


class PairMaker:
    """
    Makes pairs out of a range of prompts.

    Answers that are empty, cut off, or spell out a mark are none: nobody could train on them.

    Args:
        args ([`PairArguments`]).
        prompts ([`~llava_mod_hf.commands.generate_completions.PromptRows`]).
        model, processor: who answers.
        references (`list[str]` or `None`): right answers, for the scorer `answer`.
        teacher (`tuple` or `None`): model and processor, for the scorer `teacher`.
    """

    def __init__(self, args, prompts, model, processor, references, teacher):
        self.args, self.prompts, self.model, self.processor = args, prompts, model, processor
        self.references, self.teacher = references, teacher
        self.marks = [mark for reader in (processor, *(teacher or ())[1:]) for mark in marks_of(reader)]
        self.function = load_scorer(args.scorer) if ":" in args.scorer else None
        self.features = prompts.features(
            chosen=MESSAGES, rejected=MESSAGES, chosen_score=Value("float64"), rejected_score=Value("float64")
        )

    def _answers(self, numbers):
        args = self.args
        sampled = sample_answers(
            self.model,
            self.processor,
            self.prompts.rows.select(numbers),
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            num_answers=args.num_answers,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=shard_seed(args.seed, numbers),
        )
        kept = [[text.strip() for text, ended in row if ended or args.keep_unfinished] for row in sampled]
        return [
            list(dict.fromkeys(text for text in texts if text and find_mark(text, self.marks) is None))
            for texts in kept
        ]

    def _scores(self, numbers, rows, answers):
        """For each row a number per answer."""
        if self.function is not None:
            scores = [[float(score) for score in self.function(*each)] for each in zip(rows, answers, strict=True)]
            for number, found, given in zip(numbers, scores, answers, strict=True):
                if len(found) != len(given):
                    raise ValueError(
                        f"`{self.args.scorer}` returned {len(found)} scores for the {len(given)} answers to row "
                        f"{number}: return one for each."
                    )
            return scores
        if self.teacher is None:
            return [
                [float(normalize_answer(text) == normalize_answer(self.references[number])) for text in texts]
                for number, texts in zip(numbers, answers, strict=True)
            ]
        examples = [
            {
                "images": row["images"],
                "prompt": row["prompt"],
                "completion": [{"role": "assistant", "content": text}],
            }
            for row, texts in zip(self.prompts.rows.select(numbers), answers, strict=True)
            for text in texts
        ]
        flat = iter(
            answer_log_probs(*self.teacher, examples, batch_size=self.args.batch_size, reduction=self.args.likelihood)
        )
        return [[next(flat) for _ in texts] for texts in answers]

    def __call__(self, numbers):
        """`datasets.Dataset`: the pairs of these prompts."""
        rows, answers = self.prompts.read(numbers), self._answers(numbers)
        pairs = []
        for row, texts, scores in zip(rows, answers, self._scores(numbers, rows, answers), strict=True):
            found = best_and_worst(texts, scores)
            if found is not None:
                for name, place in zip(("chosen", "rejected"), found, strict=True):
                    row[name] = [{"role": "assistant", "content": texts[place]}]
                    row[f"{name}_score"] = scores[place]
                pairs.append(row)
        return dataset_of(pairs, self.features)


def run(data_args: PromptArguments, args: PairArguments):
    """
    Writes pairs of a model's own answers as Parquet, which `llava-mod prefer` trains on.

    Returns:
        `dict`: `prompts`, and `rows` that were written of them: those with two answers of different score.
    """
    dropped = written_down(data_args, args.output_dir, writes=PartialState().is_main_process)
    rows = load_prompts(data_args, args, dropped)
    if args.scorer == "answer":
        right_answers(rows)  # refuses before a model is loaded
    model, processor = args.load(args.model)
    teacher = args.load(args.teacher) if args.scorer == "teacher" else None
    for reader in (processor, *(teacher or ())[1:]):
        rows = unmarked(rows, reader, data_args, dropped)
    prompts = PromptRows(rows, image_root(data_args))
    references = right_answers(rows) if args.scorer == "answer" else None
    make = PairMaker(args, prompts, model, processor, references, teacher)
    settings = {
        **args.identity("model", args.model, processor),
        "scorer": args.scorer,
        **(
            args.identity("teacher", args.teacher, make.teacher[1]) | {"likelihood": args.likelihood}
            if make.teacher
            else {}
        ),
        "num_answers": args.num_answers,
        **args.sampling(),
    }
    counts = write_answers(args.output_dir, prompts, settings, make, shard_size=args.shard_size)
    if counts["rows"] < counts["prompts"]:
        logger.warning(
            "%d of %d prompts led to no two answers of different score, and are left out.",
            counts["prompts"] - counts["rows"],
            counts["prompts"],
        )
    return counts
