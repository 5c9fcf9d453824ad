"""Data sets → rows in TRL's formats, checked before training starts."""

import itertools
import logging
import re
from pathlib import Path

from datasets import Dataset, Features, Image, IterableDataset, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from llava_mod_hf import loading
from llava_mod_hf.data import easy_vqa, scene_rows
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.formats import FORMATS, image_references, json_rows, read_row, recognise
from llava_mod_hf.data.images import map_undecoded, resolve_image
from llava_mod_hf.data.parquet_shards import check_shards
from llava_mod_hf.hub_reading import told_when_the_hub_fails

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

MESSAGES = [{"role": Value("string"), "content": Value("string")}]

PROBLEM = "problem"  # column: why a row is to be left out; gone before anybody sees the rows

logger = logging.getLogger(__name__)


def load_rows(args: DataArguments, *, columns, split=None, seed=0, num_proc=None):
    """
    The rows that a stage trains on.

    Args:
        args ([`DataArguments`]).
        columns (`tuple[str]`): the columns that the stage needs, such as `("prompt", "completion")`.
        split (`str`, *optional*): by default `args.dataset_train_split`.
        seed (`int`, *optional*, defaults to 0): of the embedded data's thinning.
        num_proc (`int`, *optional*): processes that convert rows and check images.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if streamed, with `images` (lists of PIL images when read) and
        `columns`. Rows that were converted also have `source_row`, their number in the data set.

    Raises:
        ValueError: if the file or a column is missing, the format is unknown, a row is malformed, an image path leaves
            the image folder, or an image is missing, broken or a decompression bomb.
        ConnectionError: if the Hub fails while the data set is read.
    """
    if args.dataset_options and args.dataset_name != scene_rows.DATASET:
        raise ValueError(
            f"`dataset_options` are of `{scene_rows.DATASET}`, and the data set is `{args.dataset_name}`: leave them "
            "out."
        )
    if args.dataset_name.startswith(loading.PREFIX):
        dataset = _embedded(args, split or args.dataset_train_split, seed)
    else:
        try:
            dataset = _published(args, split or args.dataset_train_split, num_proc)
        except DatasetGenerationError as error:
            cause = error.__cause__ or error
            if isinstance(cause, ValueError) and str(cause).startswith("Row "):
                raise cause from error  # a sentence of ours that stopped the reading
            raise ValueError(f"`{args.dataset_name}` has no rows that can be read ({cause}).") from error

    names = dataset.column_names
    missing = [name for name in ("images", *columns) if name not in names]
    if missing:
        raise ValueError(
            f"`{args.dataset_name}` has the columns {names}, and this stage needs {', '.join(missing)} as well: "
            "docs/data.md says what for."
        )
    dataset = _first(dataset, args.max_samples)
    if not args.streaming and len(dataset) == 0:
        raise ValueError(f"`{args.dataset_name}` has no rows: nothing to train on.")
    return dataset


def _embedded(args, split, seed):
    """Rows of an embedded world."""
    if args.dataset_name == scene_rows.DATASET:
        return scene_rows.load(args.dataset_config, split, seed, args.dataset_options, streaming=args.streaming)
    if args.dataset_name == easy_vqa.DATASET:
        dataset = easy_vqa.load(args.dataset_config, split, seed)
        return dataset.to_iterable_dataset() if args.streaming else dataset
    raise ValueError(
        f"There is no data set `{args.dataset_name}`: the embedded ones are `{scene_rows.DATASET}` and "
        f"`{easy_vqa.DATASET}`."
    )


def image_root(args):
    """The folder that relative image paths of a local data set start from; `None` for any other data set."""
    path = Path(args.dataset_name)
    if path.is_dir() or path.suffix in READERS:
        return Path(args.image_folder or (path if path.is_dir() else path.parent)).resolve()
    return None


def _published(args, split, num_proc):
    """A local file or folder, or a data set of the Hub: in TRL's formats, its images checked."""
    path, root = Path(args.dataset_name), image_root(args)
    if path.suffix in READERS and not path.is_file():
        raise ValueError(f"The data file `{path}` does not exist: check `dataset_name`.")
    layout = None
    if READERS.get(path.suffix) == "json":
        first = next((row for row in json_rows(path) if isinstance(row, dict)), None)
        if first is None:
            raise ValueError(f"`{path}` has no rows of `{{key: value}}`: nothing to train on.")
        layout = recognise(first, path)
        odd = (index for index, row in enumerate(json_rows(path)) if not isinstance(row, dict))
        if FORMATS[layout].is_trl and (number := next(odd, None)) is not None:  # `datasets` dies of it
            raise ValueError(f"Row {number} of `{path}` is no `{{key: value}}`: take it out of the file.")
    if layout is not None and not FORMATS[layout].is_trl:
        dataset = _read_json(args, path, layout)
    else:
        if path.suffix in READERS:
            dataset = load_dataset(READERS[path.suffix], data_files=str(path), split="train", streaming=args.streaming)
        elif path.is_dir():
            dataset = load_dataset(
                "parquet", data_files=_parquet_files(path, split), split="train", streaming=args.streaming
            )
        else:
            with told_when_the_hub_fails(args.dataset_name):
                dataset = load_dataset(args.dataset_name, args.dataset_config, split=split, streaming=args.streaming)
        dataset = _to_trl(_first(dataset, args.max_samples), args, num_proc)
    dataset = _first(dataset, args.max_samples)
    if "images" not in dataset.column_names:
        return dataset
    if root is not None:
        dataset = _with_checked_images(dataset, root, args, num_proc)
    return _without_problems(dataset) if PROBLEM in dataset.column_names else dataset


def _parquet_files(folder, split):
    """
    Files of a split, `SPLIT-….parquet` or `SPLIT/….parquet`; of a folder without such names all belong to `train`.

    By name: `load_dataset(folder)` takes what it once read of another folder of that name for this one, if the folder
    has a card.
    """
    check_shards(folder)
    files = sorted(folder.rglob("*.parquet"))

    def of_split(pattern):
        return [file for file in files if any(re.match(rf"({pattern})\b", p) for p in file.relative_to(folder).parts)]

    chosen = of_split(re.escape(split)) or (files if split == "train" and not of_split("test|validation") else [])
    if not chosen:
        raise ValueError(
            f"The folder `{folder}` has no Parquet files of the split `{split}`, only "
            f"{[file.name for file in files[:3]]}: name them `{split}-….parquet`, or give another split."
        )
    return [str(file) for file in chosen]


def _first(dataset, max_samples):
    if max_samples is None:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.take(max_samples)
    return dataset.select(range(min(max_samples, len(dataset))))


def _standard_rows(row, index, layout, args):
    """Rows of TRL with their `source_row` and, where the row cannot be read and may be left out, their `problem`."""
    try:
        rows, problem = read_row(row, layout, f"Row {index}", multi_turn=args.multi_turn), None
    except ValueError as error:
        if args.bad_rows == "error":
            raise
        rows, problem = [{}], str(error)
    return [{**each, "source_row": index, PROBLEM: problem} for each in rows]


def _standard_features(layout, messages=MESSAGES):
    names = FORMATS[layout].gives
    if names == ("messages",):
        names = ("prompt", "completion")
    return {
        "images": List(Image()),
        **dict.fromkeys(names, messages),
        "source_row": Value("int64"),
        PROBLEM: Value("string"),
    }


def _read_json(args, path, layout):
    """LLaVA's and RLAIF-V's JSON files, read here: `datasets` refuses columns of mixed type, as their `id` is."""
    features = Features(_standard_features(layout))

    def generate(path, layout, args, changed, read):
        rows = (_standard_rows(row, index, layout, args) for index, row in enumerate(json_rows(path)))
        for row in itertools.islice(itertools.chain.from_iterable(rows), args.max_samples):
            yield dict.fromkeys(features) | row

    # by the file's time and size, and the format's reader, the cache tells a changed file from the one that it has read
    changed = (path.stat().st_mtime_ns, path.stat().st_size)
    options = {"path": str(path), "layout": layout, "args": args, "changed": changed, "read": FORMATS[layout].read}
    kind = IterableDataset if args.streaming else Dataset
    return kind.from_generator(generate, features=features, gen_kwargs=options)


def _to_trl(dataset, args, num_proc):
    """A data set of `datasets` in TRL's formats; one that is in them already is not copied."""
    if dataset.column_names is None:  # streamed without a schema
        dataset = dataset._resolve_features()
    names = dataset.column_names
    layout = recognise(names, args.dataset_name)
    single_image = "image" in names and "images" not in names
    entry = FORMATS[layout]
    conversations = entry.gives == ("messages",)
    if entry.is_trl and not single_image and not conversations:
        return dataset

    features = _standard_features(layout, dataset.features.get("messages", MESSAGES))
    if entry.is_trl and not conversations:  # only the image is in the wrong place
        features = {name: feature for name, feature in features.items() if feature is not MESSAGES}
    consumed = {"image", "images", "image_path", *(entry.columns if not entry.is_trl or conversations else ())}
    extras = {name: feature for name, feature in dataset.features.items() if name not in consumed}
    features = Features({**features, **extras})

    def convert(batch, indices):
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        read = [
            dict.fromkeys(features) | {name: row[name] for name in extras} | each
            for row, index in zip(rows, indices, strict=True)
            for each in _standard_rows(row, index, layout, args)
        ]
        return {name: [row[name] for row in read] for name in features}

    removed = [name for name in names if name not in features]
    return map_undecoded(
        dataset,
        convert,
        features=features,
        num_proc=num_proc,
        desc=f"Reading {layout} rows",
        remove_columns=removed,
    )


def _with_checked_images(dataset, root, args, num_proc):
    """Relative paths → checked absolute ones; images in the file itself are checked too."""

    whole = args.check_images == "all"

    def check(batch, indices):
        problems = batch.get(PROBLEM) or [None] * len(indices)
        for position, (images, number) in enumerate(
            zip(batch["images"], batch.get("source_row") or indices, strict=True)
        ):
            try:
                images = image_references({"images": images}, f"Row {number}")
                images = [resolve_image(image, root, f"Row {number}", whole=whole) for image in images]
            except ValueError as error:
                if args.bad_rows == "error":
                    raise
                images, problems[position] = [], problems[position] or str(error)
            batch["images"][position] = images
        return {**batch, PROBLEM: problems}

    return map_undecoded(
        dataset,
        check,
        features=Features({**dataset.features, "images": List(Image()), PROBLEM: Value("string")}),
        num_proc=num_proc,
        desc="Checking images",
        # never from the cache: the files may have changed since
        load_from_cache_file=False,
    )


def _without_problems(dataset):
    """Leaves out the rows that have a problem, and says which."""
    if isinstance(dataset, IterableDataset):

        def keep(problem):
            if problem is not None:
                logger.warning("Left out a row. %s", problem)
            return problem is None

        return dataset.filter(keep, input_columns=[PROBLEM]).remove_columns(PROBLEM)
    problems = dataset[PROBLEM][:]
    found = [problem for problem in problems if problem is not None]
    if found:
        logger.warning("Left out %d of %d rows, first: %s", len(found), len(problems), " ".join(found[:3]))
        dataset = dataset.select([index for index, problem in enumerate(problems) if problem is None])
    return dataset.remove_columns(PROBLEM)
