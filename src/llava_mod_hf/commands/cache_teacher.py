"""`llava-mod cache-teacher`: the teacher's answers to the rows of a recipe, written once."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from huggingface_hub import DatasetCard, DatasetCardData
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from llava_mod_hf.commands.arguments import DistillArguments, UpcycleArguments
from llava_mod_hf.commands.stage_parts import (
    fit_to_recipe,
    load_eval_rows,
    load_teacher,
    settings_of_teacher,
    written_down,
)
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.conversations import AnswersCollator, supervises_answers
from llava_mod_hf.data.load import load_rows
from llava_mod_hf.data.parquet_shards import check_shards, shard_path, write_shards
from llava_mod_hf.fingerprints import row_key
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.losses.rows import shift_for_next_token
from llava_mod_hf.publishing.public_names import PublicNames, last_part
from llava_mod_hf.publishing.push import push_dataset
from llava_mod_hf.recipes import packaged
from llava_mod_hf.teachers.answer_cache import mimic_settings
from llava_mod_hf.teachers.kept_answers import MOST_SAMPLES, Sample, TopK
from llava_mod_hf.teachers.live_teacher import LiveTeacher
from llava_mod_hf.training.mimic_config import MimicConfig

OPTIONS = (
    "data.arguments:DataArguments",
    "commands.arguments:DistillArguments",
    "commands.arguments:UpcycleArguments",
    "training.mimic_config:MimicConfig",
    "commands.cache_teacher:CacheCommand",
)

logger = logging.getLogger(__name__)


@dataclass
class ShardArguments:
    """
    Args:
        shard_size (`int`, *optional*, defaults to 2048): rows of a file, which is whole or absent.
        shard (`int`, *optional*): which of `num_shards` parts this process writes; by default as launched.
        num_shards (`int`, *optional*): parts that as many processes write.
        push_to (`str`, *optional*): Hub data set that the whole cache is pushed to, in one commit.
        private (`bool`, *optional*, defaults to `False`): create that repository private.
    """

    shard_size: int = 2048
    shard: int | None = None
    num_shards: int | None = None
    push_to: str | None = None
    private: bool = False

    def __post_init__(self):
        if self.shard_size < 1:
            raise ValueError(f"`shard_size` is {self.shard_size}: give at least 1.")
        if (self.shard is None) != (self.num_shards is None):
            raise ValueError("Give `shard` and `num_shards` together, or neither.")
        if self.shard is not None and not 0 <= self.shard < self.num_shards:
            raise ValueError(f"`shard` is {self.shard}: give one from 0 to {self.num_shards - 1}.")

    def processes(self, state):
        """`(index, number)` of this process among those that write shards, as launched or as chosen."""
        if self.shard is not None:
            return self.shard, self.num_shards
        return state.process_index, state.num_processes


@dataclass
class CacheCommand(ShardArguments):
    """
    [`ShardArguments`], and what is kept of the answers.

    Args:
        top_k (`int`, *optional*): tokens kept of each distribution, the most likely; 32 without `num_samples`.
        log_probs_dtype (`str`, *optional*): of their log-probabilities, `"float16"` (without it) or `"float32"`.
        num_samples (`int`, *optional*):
            Tokens drawn of each distribution, in place of `top_k`: the gradient is right in the mean. The source of the
            method has 50 (arXiv 2503.16870).
    """

    top_k: int | None = None
    log_probs_dtype: str | None = None
    num_samples: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` is {self.top_k}: give at least 1.")
        if self.log_probs_dtype not in (None, "float16", "float32"):
            raise ValueError(f"`log_probs_dtype` is {self.log_probs_dtype!r}: give float16 or float32.")
        if self.num_samples is None:
            return
        if not 1 <= self.num_samples <= MOST_SAMPLES:
            raise ValueError(f"`num_samples` is {self.num_samples}: give 1 to {MOST_SAMPLES}.")
        for name in ("top_k", "log_probs_dtype"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` is of the most likely tokens, and `num_samples` draws them: leave one out.")

    def kept(self, vocabulary, seed):
        """[`~llava_mod_hf.teachers.kept_answers.TopK`], or `Sample`, of distributions over so many tokens."""
        if self.num_samples is not None:
            return Sample(self.num_samples, vocabulary, seed)
        return TopK(self.top_k or 32, vocabulary, self.log_probs_dtype or "float16")


def response_collator(processor, args, columns):
    """The collator that [`~llava_mod_hf.MimicTrainer`] makes of these arguments, for rows with images."""
    template = None
    if args.assistant_only_loss and not has_generation_markers(processor.chat_template):
        template = get_training_chat_template(processor)
    return AnswersCollator(
        processor=processor,
        max_length=args.max_length,
        completion_only_loss=supervises_answers(args, columns),
        assistant_only_loss=args.assistant_only_loss,
        chat_template=template,
    )


class TeacherWriter:
    """
    Makes rows of a cache out of rows of a data set.

    Args:
        teacher ([`~llava_mod_hf.teachers.live_teacher.LiveTeacher`]), collator: as the trainer has them.
        rows (`datasets.Dataset`): of the recipe.
        args ([`MimicConfig`]): temperature, batch size, precision.
        kept ([`~llava_mod_hf.teachers.kept_answers.TopK`] or `Sample`): what is kept of each distribution.
    """

    def __init__(self, teacher, collator, rows, args, kept):
        self.teacher, self.collator, self.rows, self.args, self.kept = teacher, collator, rows, args, kept

    def _collate(self, numbers):
        examples = [self.rows[number] for number in numbers]
        batch = self.collator([dict(example) for example in examples])
        return numbers, [row_key(example) for example in examples], batch, self.teacher.collate(examples, batch)

    @torch.no_grad()
    def __call__(self, numbers):
        """The cache's rows for a range of the data set's."""
        device, args = self.teacher.model.device, self.args
        batches = DataLoader(
            numbers,
            batch_size=args.per_device_train_batch_size,
            num_workers=args.dataloader_num_workers,
            collate_fn=self._collate,
        )
        found: list[Dataset] = []
        precision = torch.bfloat16 if args.bf16 else torch.float16
        for places, keys, batch, own in tqdm(
            batches, desc=f"Rows from {numbers[0]}", disable=args.disable_tqdm or None
        ):
            batch, own = ({k: v.to(device) for k, v in part.items()} for part in (batch, own))
            labels = batch.pop("labels")
            keep, _ = shift_for_next_token(labels)
            flags = own["aligned"] if own else keep
            aligned = [flags[row][keep[row]].cpu() for row in range(len(keep))]
            with torch.autocast(device.type, precision, enabled=args.bf16 or args.fp16):
                answer = self.teacher.rows(batch, own, labels)
                found.append(self.kept.rows(keys, places, aligned, answer, args.temperature))
        return concatenate_datasets(found)


def run(
    data_args: DataArguments,
    distill_args: DistillArguments,
    upcycle_args: UpcycleArguments,
    args: MimicConfig,
    cache_args: CacheCommand,
):
    """
    Writes the teacher's answers to the rows of a mimic recipe into its `teacher_cache`.

    Returns:
        `Path`: the cache's folder.
    """
    (student, processor), (model, teacher_processor), rows = load_for_cache(
        data_args, distill_args, args, cache_args, columns=("prompt", "completion")
    )
    collator = response_collator(processor, args, rows.column_names)
    teacher = LiveTeacher(
        model, student=student, processor=processor, teacher_processor=teacher_processor, collator=collator
    )
    examples = [rows[number] for number in range(min(16, len(rows)))]
    unaligned = teacher.check_alignment(examples, collator([dict(example) for example in examples]))

    kept = cache_args.kept(len(teacher.head.weight), args.seed)
    settings = {
        **mimic_settings(args, processor, rows.column_names),
        **settings_of_teacher(distill_args, args.trust_remote_code),
        **kept.settings(),
    }
    make = TeacherWriter(teacher, collator, rows, args, kept)
    logger.warning("Nothing is said of %.1f %% of sampled tokens.", 100 * unaligned)
    return write_cache(data_args, distill_args, cache_args, len(rows), settings, make)


def load_for_cache(data_args, distill_args, args, cache_args, *, columns):
    """
    What a cache is made from.

    Returns:
        `tuple`: student without weights and its processor, teacher and its processor, and the rows that fit, those that
        the stage is evaluated on among them.

    Raises:
        ValueError: if there is no `teacher_cache`, or rows are streamed.
    """
    if distill_args.teacher_cache is None:
        raise ValueError("Give `teacher_cache`, the folder that the cache is written to and trained from.")
    trust = args.trust_remote_code
    student, processor = load_model_and_processor(distill_args.student, device="meta", trust_remote_code=trust)
    process, _ = cache_args.processes(PartialState())
    dropped = written_down(data_args, distill_args.teacher_cache, writes=process == 0)
    rows = load_rows(data_args, columns=columns, seed=args.seed, dropped=dropped)
    if not hasattr(rows, "__len__"):
        raise ValueError("A cache has a row for each of a known number: leave out `streaming`.")
    rows = fit_to_recipe(rows, student, processor, data_args, args, dropped)
    eval_rows = load_eval_rows(data_args, args, columns, dropped)
    eval_rows = fit_to_recipe(eval_rows, student, processor, data_args, args, dropped, evaluated=True)
    if eval_rows is not None:
        shared = [name for name in rows.column_names if name in eval_rows.column_names]
        rows = concatenate_datasets([each.select_columns(shared) for each in (rows, eval_rows)])
    teacher, teacher_processor = load_teacher(distill_args, trust)
    if distill_args.teacher_quantization is None and distill_args.teacher_device is None:
        teacher.to(args.device)
    return (student, processor), (teacher, teacher_processor), rows


def write_cache(data_args, distill_args, cache_args, num_rows, settings, make, **card):
    """
    Writes this process's shards of a cache, and the main process the card of one that is whole.

    Args:
        data_args, distill_args, cache_args: the options of the command.
        num_rows, settings, make: as for [`~llava_mod_hf.data.parquet_shards.write_shards`].
        card: `title` and `template`, as for [`finish_cache`].

    Returns:
        `Path`: the cache's folder.
    """
    folder, state = Path(distill_args.teacher_cache), PartialState()
    process, processes = cache_args.processes(state)
    written = write_shards(
        folder,
        num_rows,
        settings,
        make,
        shard_size=cache_args.shard_size,
        process=process,
        num_processes=processes,
        option="teacher_cache",
    )
    logger.warning("Wrote %d shards.", written)
    state.wait_for_everyone()
    if state.is_main_process:
        finish_cache(folder, num_rows, settings, distill_args, data_args, cache_args, **card)
    return folder


def finish_cache(
    folder, num_rows, settings, distill_args, data_args, cache_args, *, title="Answers", template="cache.md.j2"
):
    """Writes the card of a cache that is whole, and pushes it; leaves one that other processes still write."""
    count = -(-num_rows // cache_args.shard_size)
    if not all(shard_path(folder, index, count).is_file() for index in range(count)):
        if cache_args.push_to:
            check_shards(folder)
        return
    public, given = PublicNames(), {"teacher": [distill_args.teacher], "dataset": dict.fromkeys(data_args.names())}
    names = {
        role: ", ".join(last_part(name) if public.is_local(name) else name for name in each)
        for role, each in given.items()
    }
    linked = {role: [name for name in each if public.is_hub_id(name)] or None for role, each in given.items()}
    card = DatasetCard.from_template(
        DatasetCardData(
            pretty_name=f"{title} of {names['teacher']}",
            tags=["llava-mod", "distillation", "teacher-cache"],
            source_datasets=linked["dataset"],
            teacher_model=linked["teacher"],
            configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "*.parquet"}]}],
        ),
        template_path=str(packaged("model_cards", template)),
        settings=settings,
        num_rows=num_rows,
        repo_id=cache_args.push_to or folder.name,
        **names,
    )
    card.save(folder / "README.md")
    if cache_args.push_to:
        commit = push_dataset(folder, cache_args.push_to, private=cache_args.private)
        logger.warning("Pushed `%s` to %s.", folder, commit.commit_url)
