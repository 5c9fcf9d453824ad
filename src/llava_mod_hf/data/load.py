"""Data sets → rows in TRL's formats, checked before training starts."""

import collections
import itertools
from pathlib import Path

from datasets import Dataset, Features, Image, IterableDataset, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from llava_mod_hf import loading
from llava_mod_hf.data import easy_vqa, scene_rows
from llava_mod_hf.data.arguments import DataArguments
from llava_mod_hf.data.dropped_rows import DroppedRows
from llava_mod_hf.data.formats import FORMATS, has_turns, image_references, read_row, recognise
from llava_mod_hf.data.image_files import resolve_image
from llava_mod_hf.data.images import map_undecoded
from llava_mod_hf.data.mixture import (
    MESSAGES,
    PARTS,
    NeedsParts,
    first_rows,
    in_one_form,
    mix_rows,
    parts_row,
    plain_row,
)
from llava_mod_hf.data.problems import PROBLEM, without_problems
from llava_mod_hf.data.row_files import (
    METADATA,
    SUFFIXES,
    files_of,
    first_odd_row,
    first_row,
    rows_of,
    sample_columns,
    unwrap_sample,
)
from llava_mod_hf.hub_reading import told_when_the_hub_fails

TEXTS, IN_PARTS = "texts", "parts"  # forms of messages

FORMS = {TEXTS: MESSAGES, IN_PARTS: PARTS}

LOOKED_AT = 100  # rows of a stream that tell its form


def load_rows(args: DataArguments, *, columns, split=None, seed=0, num_proc=None, dropped=None):
    """
    The rows that a stage trains on.

    Args:
        args ([`DataArguments`]).
        columns (`tuple[str]`): the columns that the stage needs, such as `("prompt", "completion")`.
        split (`str`, *optional*): by default `args.dataset_train_split`, or of a mixture each entry's own.
        seed (`int`, *optional*, defaults to 0): of the embedded data's thinning, and of a mixture's order.
        num_proc (`int`, *optional*): processes that convert rows and check images.
        dropped ([`~llava_mod_hf.data.dropped_rows.DroppedRows`], *optional*):
            Where the rows that `bad_rows: drop` leaves out are written down, by default nowhere. Of a stream that is
            read to its end, `dropped.judge()` compares them with `max_bad_rows` there.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if streamed, with `images` (lists of PIL images when read) and
        `columns`. Rows that were converted also have `source_row`, their number in the data set; those of a mixture
        always, and the data set's name as `source_dataset`.

    Raises:
        ValueError: if the file or a column is missing, the format is unknown, a row is malformed, an image path leaves
            the image folder, or an image is missing, broken or a decompression bomb; with `bad_rows: drop`, if more
            rows are so than `max_bad_rows` allows.
        ConnectionError: if the Hub fails while the data set is read.
    """
    sources = args.sources(split)
    dropped = DroppedRows(max_share=args.max_bad_rows) if dropped is None else dropped
    loaded = [_load(source, columns, seed, num_proc, dropped) for source in sources]
    if args.datasets is None:
        return loaded[0]
    labels = [source.label for source in sources]
    loaded = in_one_form(loaded, labels, columns, num_proc=num_proc)
    mixed = mix_rows(loaded, labels, args.weights, stopping_strategy=args.stopping_strategy, seed=seed)
    return first_rows(mixed, args.max_samples)


def _load(args, columns, seed, num_proc, dropped):
    """The rows of one [`~llava_mod_hf.data.arguments.DataSource`]."""
    split = args.dataset_train_split
    if args.dataset_options and args.dataset_name != scene_rows.DATASET:
        raise ValueError(
            f"`{'dataset_options' if args.label is None else 'options'}` are of `{scene_rows.DATASET}`, and the data "
            f"set is `{args.dataset_name}`: leave them out."
        )
    if args.dataset_name.startswith(loading.PREFIX):
        _check_keys(args, ("data_dir", "data_files", "columns"), "an embedded one")
        dataset = _embedded(args, split, seed)
    else:
        try:
            dataset = _published(args, split, num_proc, dropped)
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
    dataset = first_rows(dataset, args.max_samples)
    if not args.streaming and len(dataset) == 0:
        raise ValueError(f"`{args.dataset_name}` has no rows: nothing to train on.")
    return dataset


def _check_keys(args, names, what):
    """Refuses keys of an entry that do nothing for its data set."""
    for name in names:
        if getattr(args, name) is not None:
            key = "name" if name == "dataset_config" else name
            raise ValueError(f"`{key}` is given with the data set `{args.dataset_name}`, {what}: leave it out.")


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
    """The folder that relative image paths of a local data set start from; `None` for any other, and for a mixture."""
    path = Path(args.dataset_name or "")
    if args.dataset_name and (path.is_dir() or path.suffix in SUFFIXES):
        return Path(args.image_folder or (path if path.is_dir() else path.parent)).resolve()
    return None


def _published(args, split, num_proc, dropped):
    """A local file or folder, or a data set of the Hub: in TRL's formats, its images checked."""
    path, root = Path(args.dataset_name), image_root(args)
    if root is None:
        more = {name: value for name in ("data_dir", "data_files") if (value := getattr(args, name)) is not None}
        with told_when_the_hub_fails(args.dataset_name):
            dataset = load_dataset(
                args.dataset_name, args.dataset_config, split=split, streaming=args.streaming, **more
            )
        dataset = _converted(dataset, args, num_proc)
    else:
        if args.label is not None:
            _check_keys(args, ("dataset_config", "data_dir", "data_files"), "a file or folder of this machine")
            if split != "train" and not path.is_dir():
                raise ValueError(f"`{path}` is one file, without splits, and the `split` is `{split}`: leave it out.")
        files = files_of(path, split, "dataset_name" if args.label is None else "path")
        if files[0].name in METADATA and args.image_folder is None:
            root = files[0].parent.resolve()
        dataset = _local(args, files, num_proc)
    dataset = first_rows(dataset, args.max_samples)
    if "images" in dataset.column_names:
        if root is not None:
            dataset = _with_checked_images(dataset, root, args, num_proc)
        name = args.label or args.dataset_name
        dataset = without_problems(dataset, dropped.reading(name if split == "train" else f"{name} ({split})"))
    return dataset


def _local(args, files, num_proc):
    """Rows of local files: read here, or by `datasets` if they are in TRL's format and of no mixed types."""
    kind = "parquet" if files[0].suffix == ".parquet" else "json"
    if kind == "json":
        first = _select(first_row(files, args.dataset_name), args)
        layout = recognise(first, args.dataset_name)
        own = files[0].suffix in (".csv", ".tar") or files[0].name in METADATA or has_turns(first)
        if own or not FORMATS[layout].is_trl:
            return _read_files(args, files, layout, first)
        if (number := first_odd_row(files)) is not None:  # `datasets` dies of it
            raise ValueError(f"Row {number} of `{files[0]}` is no `{{key: value}}`: take it out of the file.")
    names = [str(file) for file in files]
    return _converted(load_dataset(kind, data_files=names, split="train", streaming=args.streaming), args, num_proc)


def _select(row, args):
    """A row's `columns`, all of them if the data set's entry names none."""
    if args.columns is None:
        return row
    missing = [name for name in args.columns if name not in row]
    if missing:
        raise ValueError(
            f"`{args.dataset_name}` has the columns {list(row)}, and `columns` asks for {', '.join(missing)} as well."
        )
    return {name: row[name] for name in args.columns}


def _converted(dataset, args, num_proc):
    """A data set of `datasets`: its `columns`, in TRL's formats, its rows numbered if a mixture has others."""
    if dataset.column_names is None:  # streamed without a schema
        dataset = dataset._resolve_features()
    if args.columns is not None:
        dataset = dataset.select_columns(list(_select(dict.fromkeys(dataset.column_names), args)))
    dataset = _to_trl(first_rows(dataset, args.max_samples), args, num_proc)
    if args.label is None or PROBLEM in dataset.column_names:
        return dataset
    dataset = dataset.remove_columns([name for name in ("source_row",) if name in dataset.column_names])
    if not args.streaming:
        return dataset.add_column("source_row", list(range(len(dataset))))
    return map_undecoded(
        dataset,
        lambda batch, indices: {**batch, "source_row": indices},
        features=Features({**dataset.features, "source_row": Value("int64")}),
    )


def _in_form(make, streaming):
    """
    Rows whose messages are texts, or of parts where a row has pictures that texts cannot place.

    Args:
        make (`Callable[[str, bool], Dataset | IterableDataset]`):
            A key of `FORMS`, and whether a row of another form is an error whatever `bad_rows` says → rows.
        streaming (`bool`): then the first rows tell; the others are read when it is too late.
    """
    try:
        rows = make(TEXTS, True)
        if streaming:
            collections.deque(rows.select_columns(["source_row"]).take(LOOKED_AT), maxlen=0)
            return make(TEXTS, False)
        return rows
    except NeedsParts:
        return make(IN_PARTS, False)
    except DatasetGenerationError as error:
        if not isinstance(error.__cause__, NeedsParts):
            raise
        return make(IN_PARTS, False)


# parameters: the last two say how it is read, and are bound once
def _standard_rows(row, index, layout, args, form=None, strict=False):
    """Rows of TRL with their `source_row` and, where the row cannot be read and may be left out, their `problem`."""
    try:
        rows, problem = read_row(row, layout, args.where(index), multi_turn=args.multi_turn), None
        if form is not None:
            rows = [parts_row(row) if form == IN_PARTS else plain_row(row, args.where(index)) for row in rows]
    except ValueError as error:
        if args.bad_rows == "error" or (strict and isinstance(error, NeedsParts)):
            raise
        rows, problem = [{}], str(error)
    return [{**each, "source_row": index, PROBLEM: problem} for each in rows]


def _standard_features(layout, messages):
    names = FORMATS[layout].gives
    if names == ("messages",):
        names = ("prompt", "completion")
    return {
        "images": List(Image()),
        **dict.fromkeys(names, messages),
        "source_row": Value("int64"),
        PROBLEM: Value("string"),
    }


def _read_files(args, files, layout, first):
    """Files that are read here: `datasets` refuses columns of mixed type, as LLaVA's `id` is."""
    names = _standard_features(layout, MESSAGES)
    texts = [name for name in names if FORMATS[layout].is_trl and isinstance(first.get(name), str)]
    texts = [] if has_turns(first) else texts

    def generate(files, layout, args, changed, read, names, form, strict):
        rows = (
            _standard_rows(_select_known(row, args), index, layout, args, form, strict)
            for index, row in enumerate(rows_of(files))
        )
        for row in itertools.islice(itertools.chain.from_iterable(rows), args.max_samples):
            yield dict.fromkeys(names) | row

    # by the files' time and size, and the format's reader, the cache tells a changed file from the one that it has read
    changed = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    # in a tuple: of a list `datasets` would make shards, whose rows it counts from 0 each
    options = {"files": tuple(files), "layout": layout, "args": args, "changed": changed, "read": FORMATS[layout].read}
    kind = IterableDataset if args.streaming else Dataset

    def make(form, strict):
        features = Features({**_standard_features(layout, FORMS[form]), **dict.fromkeys(texts, Value("string"))})
        own = {**options, "names": tuple(features), "form": None if texts else form, "strict": strict}
        return kind.from_generator(generate, features=features, gen_kwargs=own)

    return make(TEXTS, False) if texts else _in_form(make, args.streaming)


def _select_known(row, args):
    """A row's `columns`, as far as it has them."""
    if args.columns is None or not isinstance(row, dict):
        return row
    return {name: row[name] for name in args.columns if name in row}


def _to_trl(dataset, args, num_proc):
    """A data set of `datasets` in TRL's formats; one that is in them already is not copied."""
    names, inside = dataset.column_names, sample_columns(dataset.features)
    layout = recognise(inside or names, args.dataset_name)
    single_image = "image" in names and "images" not in names
    entry = FORMATS[layout]
    conversations = entry.gives == ("messages",)
    foreign = inside or has_turns(dataset.features)
    if entry.is_trl and not single_image and not conversations and not foreign:
        return dataset

    consumed = {
        "image",
        "images",
        "image_path",
        *(entry.columns if not entry.is_trl or conversations or foreign else ()),
    } - {*entry.keeps}
    consumed = {*names, "image"} if inside else consumed
    extras = {name: feature for name, feature in dataset.features.items() if name not in consumed}

    def make(messages, form=None, strict=False):
        features = _standard_features(layout, messages)
        if entry.is_trl and not conversations and not foreign:  # only the image is in the wrong place
            features = {name: feature for name, feature in features.items() if feature is not messages}
        features = Features({**features, **extras})

        def convert(batch, indices):
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            read = [
                dict.fromkeys(features) | {name: row[name] for name in extras} | each
                for row, index in zip(rows, indices, strict=True)
                for each in _standard_rows(unwrap_sample(row) if inside else row, index, layout, args, form, strict)
            ]
            return {name: [row[name] for row in read] for name in features}

        return map_undecoded(
            dataset,
            convert,
            features=features,
            num_proc=num_proc,
            desc=f"Reading {layout} rows",
            remove_columns=[name for name in names if name not in features],
        )

    if entry.is_trl and not foreign:  # messages are as they are there
        return make(dataset.features.get("messages", MESSAGES))
    return _in_form(lambda form, strict: make(FORMS[form], form, strict), args.streaming)


def _with_checked_images(dataset, root, args, num_proc):
    """Relative paths → checked absolute ones; images in the file itself are checked too."""

    whole = args.check_images == "all"

    def check(batch, indices):
        problems = batch.get(PROBLEM) or [None] * len(indices)
        for position, (images, number) in enumerate(
            zip(batch["images"], batch.get("source_row") or indices, strict=True)
        ):
            try:
                images = image_references({"images": images}, args.where(number))
                images = [resolve_image(image, root, args.where(number), whole=whole) for image in images]
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
