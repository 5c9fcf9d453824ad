"""`llava-mod generate-completions`: a model's own answers to the prompts of a data set, as a data set."""

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, Features, Image, List
from pyarrow.parquet import read_metadata

from llava_mod_hf.commands.stage_parts import unmarked, written_down
from llava_mod_hf.data.arguments import PromptArguments
from llava_mod_hf.data.load import MESSAGES, image_root, load_rows
from llava_mod_hf.data.marks import find_mark, marks_of
from llava_mod_hf.data.mixture import SOURCE
from llava_mod_hf.data.parquet_shards import check_shards, write_shards
from llava_mod_hf.evaluation.answers import sample_answers
from llava_mod_hf.fingerprints import content_hash, processor_parts
from llava_mod_hf.loading import load_model_and_processor
from llava_mod_hf.teachers.answer_cache import teacher_settings

OPTIONS = ("data.arguments:PromptArguments", "commands.generate_completions:GenerationArguments")

logger = logging.getLogger(__name__)


@dataclass
class GenerationArguments:
    """
    Who answers, and how.

    Args:
        model (`str`): the LLaVA that answers.
        output_dir (`str`): where the data set goes; what an interrupted run has written is kept.
        temperature (`float`, *optional*, defaults to 0.0): of the sampling; 0 takes the most likely token.
        top_p (`float`, *optional*, defaults to 1.0): sample among the most likely tokens of this total probability.
        max_new_tokens (`int`, *optional*, defaults to 512): where an answer without an end is cut.
        keep_unfinished (`bool`, *optional*, defaults to `False`):
            Keep answers that were cut: who trains on them learns to stop in the middle of a sentence.
        batch_size (`int`, *optional*, defaults to 16): prompts answered at a time.
        shard_size (`int`, *optional*, defaults to 1024): prompts of a file, which is whole or absent.
        seed (`int`, *optional*, defaults to 0): of the sampling, and of the embedded data's thinning.
        dtype (`str`, *optional*, defaults to `"float32"`): of the model's weights in memory.
        attn_implementation (`str`, *optional*): as in transformers, such as `sdpa` or `eager`.
        device (`str`, *optional*): where the model goes, as transformers' `device_map`; by default as launched.
        num_proc (`int`, *optional*): processes that read and check the rows.
        trust_remote_code (`bool`, *optional*, defaults to `False`).
    """

    model: str = field(metadata={"help": "the LLaVA that answers"})
    output_dir: str = field(metadata={"help": "where the data set goes"})
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    keep_unfinished: bool = False
    batch_size: int = 16
    shard_size: int = 1024
    seed: int = 0
    dtype: str = "float32"
    attn_implementation: str | None = None
    device: str | None = None
    num_proc: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"`temperature` is {self.temperature} and `top_p` {self.top_p}: give a temperature of at least 0 and a "
                "`top_p` above 0 and of at most 1."
            )
        for name in ("max_new_tokens", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: give at least 1.")

    def load(self, name):
        """A model, on the device of this process, and its processor."""
        model, processor = load_model_and_processor(
            name,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )
        return (model.to(PartialState().device) if self.device is None else model), processor

    def identity(self, role, name, processor):
        """What says whether a model is the same, for `shards.yaml`."""
        settings = teacher_settings(name, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        parts = processor_parts(processor)
        settings |= {name: parts[name] for name in ("tokenizer", "chat_template")}
        return {role: content_hash(settings)}

    def sampling(self):
        """How answers are sampled, for `shards.yaml`."""
        names = ("temperature", "top_p", "max_new_tokens", "keep_unfinished", "batch_size", "seed")
        return {name: getattr(self, name) for name in names}


def load_prompts(data_args, args, dropped, *, columns=()):
    """
    Rows with a `prompt`.

    Args:
        data_args ([`PromptArguments`]), args ([`GenerationArguments`]).
        dropped ([`~llava_mod_hf.data.dropped_rows.DroppedRows`]), columns (`tuple[str]`, *optional*): as for
            [`~llava_mod_hf.data.load.load_rows`], besides `prompt`.

    Raises:
        ValueError: if the rows are streamed, or their prompts are no messages.
    """
    if data_args.streaming:
        raise ValueError("`streaming` is true, and a data set is written of a known number of rows: leave it out.")
    if data_args.multi_turn != "expand":
        raise ValueError('`multi_turn` must be "expand" here: each answer of a conversation has its own prompt.')
    rows = load_rows(data_args, columns=("prompt", *columns), seed=args.seed, num_proc=args.num_proc, dropped=dropped)
    if not isinstance(rows[:1]["prompt"][0], list):
        raise ValueError(
            f"The prompts of `{'`, `'.join(data_args.names())}` are no messages: write them as `role`, `content`."
        )
    return rows


class PromptRows:
    """
    Rows whose images stay as they are when they are written again: bytes as bytes, paths relative to their folder.

    Args:
        rows (`datasets.Dataset`): as [`load_prompts`] returns them.
        root (`Path` or `None`): the folder of their images; images elsewhere are put into the file.
    """

    dropped = ("completion", "chosen", "rejected", "length", "num_images")

    def __init__(self, rows, root):
        self.root = root
        # the names of a mixture's data sets are paths of this machine, and its rows' numbers say nothing without them
        dropped = (*self.dropped, *((SOURCE, "source_row") if SOURCE in rows.column_names else ()))
        self.rows = rows.remove_columns([name for name in dropped if name in rows.column_names])

    def features(self, **added):
        """Of the written rows, with `added` columns."""
        return Features({**self.rows.features, "images": List(Image()), **added})

    def read(self, numbers):
        """`list[dict]`: rows with undecoded images."""
        batch = self.rows.with_format("arrow")[numbers.start : numbers.stop].to_pydict()
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return [{**row, "images": [self._portable(image) for image in row["images"] or []]} for row in rows]

    def _portable(self, image):
        if image["bytes"] is not None:
            return image
        path = Path(image["path"])
        if self.root is not None and path.is_relative_to(self.root):
            return {"bytes": None, "path": str(path.relative_to(self.root))}
        return {"bytes": path.read_bytes(), "path": path.name}

    def fingerprint(self):
        """A hash of all prompts and images; of images in a folder, of their names."""
        digest = hashlib.blake2b(digest_size=8)
        for start in range(0, len(self.rows), 1000):
            for row in self.read(range(start, min(start + 1000, len(self.rows)))):
                images = [
                    image["path"] if image["bytes"] is None else hashlib.blake2b(image["bytes"]).hexdigest()
                    for image in row["images"]
                ]
                rest = {name: value for name, value in row.items() if name != "images"}
                digest.update(content_hash([images, rest]).encode())
        return digest.hexdigest()


def write_answers(folder, prompts, settings, make, *, shard_size):
    """
    Writes a data set of answers, over as many processes as were launched, and counts what came out.

    Args:
        folder (`str` or `Path`), settings (`dict`), make (`Callable`), shard_size (`int`): as for `write_shards`.
        prompts ([`PromptRows`]).

    Returns:
        `dict`: `prompts` and `rows` that came of them.

    Raises:
        ValueError: if the folder was begun otherwise, or no row came out.
    """
    state = PartialState()
    settings = {**settings, "rows": prompts.fingerprint()}
    write_shards(
        folder,
        len(prompts.rows),
        settings,
        make,
        shard_size=shard_size,
        process=state.process_index,
        num_processes=state.num_processes,
    )
    state.wait_for_everyone()
    check_shards(folder)
    written = sum(read_metadata(path).num_rows for path in Path(folder).glob("*.parquet"))
    counts = {"prompts": len(prompts.rows), "rows": written}
    if not counts["rows"]:
        raise ValueError(f"None of the {counts['prompts']} prompts led to a row of `{folder}`: see its `shards.yaml`.")
    return counts


def run(data_args: PromptArguments, args: GenerationArguments):
    """
    Writes a model's answers to the prompts of a data set as Parquet, which the same recipe trains on.

    Every other column is kept, an image in a folder stays there, and earlier answers of the row are left out.

    Returns:
        `dict`: `prompts`, and `rows` that were written of them: those with an answer that is not empty, has an end, and
        spells out no mark that would be read as a picture or as somebody else's turn.
    """
    dropped = written_down(data_args, args.output_dir, writes=PartialState().is_main_process)
    rows = load_prompts(data_args, args, dropped)
    model, processor = args.load(args.model)
    rows, marks = unmarked(rows, processor, data_args, dropped), marks_of(processor)
    prompts = PromptRows(rows, image_root(data_args))
    features = prompts.features(completion=MESSAGES)

    def make(numbers):
        answers = sample_answers(
            model,
            processor,
            prompts.rows.select(numbers),
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=shard_seed(args.seed, numbers),
        )
        rows = [
            {**row, "completion": [{"role": "assistant", "content": text.strip()}]}
            for row, ((text, ended),) in zip(prompts.read(numbers), answers, strict=True)
            if text.strip() and (ended or args.keep_unfinished) and find_mark(text, marks) is None
        ]
        return dataset_of(rows, features)

    settings = {
        **args.identity("model", args.model, processor),
        **args.sampling(),
    }
    counts = write_answers(args.output_dir, prompts, settings, make, shard_size=args.shard_size)
    if counts["rows"] < counts["prompts"]:
        logger.warning(
            "%d of %d prompts got an answer that is empty or was cut at `max_new_tokens` (%d), or that spells out a "
            "mark, and are left out.",
            counts["prompts"] - counts["rows"],
            counts["prompts"],
            args.max_new_tokens,
        )
    return counts


def dataset_of(rows, features):
    """`datasets.Dataset` of rows, of which there may be none."""
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def shard_seed(seed, numbers):
    """A seed for a shard of its own, so that it comes out the same whatever was written before."""
    return int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(seed + 1_000_003 * numbers.start)))
