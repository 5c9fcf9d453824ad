"""Which rows a command reads: its options alone, so that `--help` need not import what reads them."""

import collections
import dataclasses
import difflib
import json
import math
import os
from dataclasses import dataclass, field

from trl.scripts.utils import DatasetConfig

from llava_mod_hf.data.dropped_rows import MAX_SHARE

CHOICES = {"multi_turn": ["whole", "expand"], "check_images": ["all", "header"], "bad_rows": ["error", "drop"]}

STOPPING = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")  # as `datasets` has them

# what `datasets` calls its readers; TRL's `path` takes these, with `data_files`
READERS_OF_DATASETS = ("json", "csv", "parquet", "arrow", "text", "webdataset", "imagefolder")


@dataclass
class DatasetEntry(DatasetConfig):
    """
    One data set of a mixture: TRL's keys, and ours.

    Args:
        path (`str`): as `dataset_name` of [`DataArguments`].
        name (`str`, *optional*): configuration of an embedded data set, or of one of the Hub.
        data_dir, data_files (*optional*): of a data set of the Hub, as in `datasets.load_dataset`.
        split (`str`, *optional*, defaults to `"train"`).
        columns (`list[str]`, *optional*): the columns that are read, pictures too; by default all.
        fraction (`float`, *optional*): TRL's, refused; `weight` is a share that a stream knows, too.
        weight (`float`, *optional*):
            How often the next row of the mixture is one of this data set's, as a share of the sum of all weights.
        image_folder (`str`, *optional*): as in [`DataArguments`], whose own is that of entries without one.
        max_samples (`int`, *optional*): take the first rows of this data set only.
        options (`dict`, *optional*): as `dataset_options`.
    """

    weight: float | None = None
    image_folder: str | None = None
    max_samples: int | None = None
    options: dict | None = None

    def __post_init__(self):
        for key in ("path", "image_folder"):
            if isinstance(getattr(self, key), os.PathLike):
                setattr(self, key, os.fspath(getattr(self, key)))
        where = f"The entry `{self.path}` of `datasets`"
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"An entry of `datasets` has the `path` {self.path!r}: give a file, folder or data set.")
        if self.path in READERS_OF_DATASETS:
            raise ValueError(
                f"{where} is a reader of the library `datasets`: give the file or folder itself as `path`, in an entry "
                "of its own."
            )
        if self.fraction is not None:
            raise ValueError(
                f"{where} has TRL's `fraction`, which streams cannot have: give every entry a `weight` in its place."
            )
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if self.weight is not None and not (number and 0 < self.weight < math.inf):
            raise ValueError(f"{where} has the `weight` {self.weight!r}: give a number above 0.")
        for key, kind, told in (
            ("name", str, "a text"),
            ("split", str, "a text"),
            ("image_folder", str, "a path"),
            ("max_samples", int, "how many rows"),
            ("columns", list, "a list of names"),
            ("options", dict, "options and their values"),
        ):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, kind | None if key != "split" else kind):
                raise ValueError(f"{where} has the `{key}` {value!r}: give {told}.")

    def given(self):
        """`dict`: its keys as a recipe gives them, without those that have their default."""
        return {
            item.name: value for item in dataclasses.fields(self) if (value := getattr(self, item.name)) != item.default
        }


@dataclass
class DataArguments:
    """
    Which rows: of one data set, or of several.

    Args:
        dataset_name (`str`, *optional*):
            `embedded:scenes`, `embedded:easy-vqa`, a local `.json`, `.jsonl`, `.csv`, `.parquet` or `.tar` file, a
            folder of Parquet files, of shards or of pictures with their `metadata`, or a data set of the Hub. Its
            format is told by its columns: docs/data.md has the table.
        datasets (`list[DatasetEntry]`, *optional*):
            Several data sets in place of one, as [`DatasetEntry`] or its keys. With a `weight` for each, rows are drawn
            from them by these shares; without, they follow each other, each row once. On the command line a path, or
            an entry's keys as JSON, each.
        stopping_strategy (`str`, *optional*):
            When a mixture with weights ends, as in `datasets.interleave_datasets`: by default `"first_exhausted"`, when
            the first data set has no more rows, of which none comes twice; `"all_exhausted"`, when the last one has
            none, the others begin anew; `"all_exhausted_without_replacement"`, when each row came once.
        dataset_config (`str`, *optional*): configuration of the data set, such as `questions` of the embedded one.
        dataset_options (`dict`, *optional*):
            Of `embedded:scenes`, as [`~llava_mod_hf.data.scene_rows.SceneOptions`]: how many rows, how skewed a world,
            what share of wrong answers; on the command line as JSON.
        dataset_train_split (`str`, *optional*, defaults to `"train"`).
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            What `evaluate` reads, and what a stage with `eval_strategy` is evaluated on, without `test_split_size`.
        eval_dataset_name (`str`, *optional*): another data set that a stage is evaluated on, as `dataset_name`.
        max_eval_samples (`int`, *optional*): take the first of those rows only.
        image_folder (`str`, *optional*):
            Where relative image paths of a local file or folder start, by default there; none may leave it. Of a
            mixture, for the entries that name none.
        max_samples (`int`, *optional*): take the first rows only.
        multi_turn (`str`, *optional*, defaults to `"whole"`):
            What becomes of a conversation. `"whole"`: one row and one pass, of which every answer is supervised,
            whatever the chat template; where the template writes earlier turns otherwise once others follow, a row for
            every answer all the same. `"expand"`: a row for every answer, with all that came before as its prompt,
            which is computed again for each; one that does not fit the context costs the later turns only.
        check_images (`str`, *optional*, defaults to `"all"`):
            `"all"` reads every image of a local file to its end; `"header"` its size and format only, and does not
            notice a truncated one. Either refuses decompression bombs and files that are missing or no images.
        bad_rows (`str`, *optional*, defaults to `"error"`):
            `"error"` stops at the first row that cannot be used; `"drop"` leaves such rows out and writes down which,
            in `dropped_rows.jsonl` of the run's folder.
        max_bad_rows (`float`, *optional*, defaults to 0.01):
            With `bad_rows: drop`, the share of the rows seen that may be left out as unusable, from 0 to 1: of each
            data set at the end of its reading, of a stream after every 1,000 rows and at its end.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows when they are needed, in the file's order; training then needs `max_steps`.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "embedded:scenes, embedded:easy-vqa, a local file or folder, or a data set of the Hub"},
    )
    dataset_config: str | None = None
    dataset_options: dict | str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    eval_dataset_name: str | None = None
    max_eval_samples: int | None = None
    image_folder: str | None = None
    max_samples: int | None = None
    multi_turn: str = field(default="whole", metadata={"choices": CHOICES["multi_turn"]})
    check_images: str = field(default="all", metadata={"choices": CHOICES["check_images"]})
    bad_rows: str = field(default="error", metadata={"choices": CHOICES["bad_rows"]})
    max_bad_rows: float = MAX_SHARE
    streaming: bool = False
    datasets: list[str] | None = field(
        default=None, metadata={"help": "several data sets in place of one: paths, or an entry's keys as JSON each"}
    )
    stopping_strategy: str | None = field(default=None, metadata={"choices": list(STOPPING)})

    def __post_init__(self):
        if isinstance(self.dataset_options, str):
            try:
                self.dataset_options = json.loads(self.dataset_options)
            except ValueError as error:
                raise ValueError(
                    f"`dataset_options` is `{self.dataset_options}`, which is no JSON ({error})."
                ) from error
        if self.dataset_options is not None and not isinstance(self.dataset_options, dict):
            raise ValueError(f"`dataset_options` is {self.dataset_options!r}: give options and their values.")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: give one of {', '.join(known)}.")
        share = self.max_bad_rows
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"`max_bad_rows` is {share!r}: give a share of the rows, from 0 to 1.")
        if share != MAX_SHARE and self.bad_rows != "drop":
            raise ValueError(f"`max_bad_rows` is {share}, which does nothing without `bad_rows: drop`: give that too.")
        self._check_mixture()

    def _check_mixture(self):
        if self.datasets is not None:
            if not isinstance(self.datasets, list | tuple) or not self.datasets:
                raise ValueError(f"`datasets` is {self.datasets!r}: give a list of entries, with a `path` each.")
            self.datasets = [_entry(value, number) for number, value in enumerate(self.datasets)]
        if (self.dataset_name is None) == (self.datasets is None):
            given = "neither is given" if self.dataset_name is None else "both are given"
            raise ValueError(f"The rows are those of `dataset_name` or of `datasets`, and {given}: give one of them.")
        for name in ("dataset_config", "dataset_options"):
            if self.datasets and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is of `dataset_name`: give it to the entries of `datasets`.")
        if self.datasets and self.dataset_train_split != "train":
            raise ValueError("`dataset_train_split` is of `dataset_name`: give the entries of `datasets` a `split`.")
        weights = self.weights
        if self.stopping_strategy is not None and self.stopping_strategy not in STOPPING:
            raise ValueError(f"`stopping_strategy` is {self.stopping_strategy!r}: give one of {', '.join(STOPPING)}.")
        if weights is not None:
            return
        if self.stopping_strategy is not None:
            raise ValueError("`stopping_strategy` does nothing without a `weight` for each entry of `datasets`.")
        for name in ("streaming", "max_samples"):
            if self.datasets and len(self.datasets) > 1 and getattr(self, name):
                raise ValueError(
                    f"`{name}` takes the first rows, and without weights these are the first data set's: give every "
                    "entry of `datasets` a `weight`."
                )

    @property
    def weights(self):
        """`list[float]` or `None`: the entries' weights."""
        weights = [entry.weight for entry in self.datasets or ()]
        if weights.count(None) == len(weights):
            return None
        if None in weights:
            raise ValueError(
                f"The entry `{self.datasets[weights.index(None)].path}` of `datasets` has no `weight`, and others have "
                "one: give it to every entry, or to none."
            )
        return weights

    def names(self):
        """`list[str]`: the data sets as they were named."""
        return [self.dataset_name] if self.datasets is None else [entry.path for entry in self.datasets]

    def sources(self, split=None):
        """
        Args:
            split (`str`, *optional*): in place of `dataset_train_split`, or of every entry's own.

        Returns:
            `list[DataSource]`: what is read, in order.
        """
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        if self.datasets is None:
            return [DataSource(**{**own, "dataset_train_split": split or self.dataset_train_split})]
        labels = _labels(self.datasets)
        return [
            DataSource(
                **{
                    **own,
                    "datasets": None,
                    "dataset_name": entry.path,
                    "dataset_config": entry.name,
                    "dataset_options": entry.options,
                    "dataset_train_split": split or entry.split,
                    "image_folder": entry.image_folder or self.image_folder,
                    # a mixture of so many rows needs no more of any of them
                    "max_samples": min(
                        (n for n in (entry.max_samples, self.max_samples) if n is not None), default=None
                    ),
                },
                data_dir=entry.data_dir,
                data_files=entry.data_files,
                columns=entry.columns,
                label=label,
            )
            for entry, label in zip(self.datasets, labels, strict=True)
        ]


@dataclass
class DataSource(DataArguments):
    """
    One data set that is read.

    Args:
        data_dir, data_files, columns (*optional*): as in [`DatasetEntry`].
        label (`str`, *optional*): its name in a mixture, for messages and counts.
    """

    data_dir: str | None = None
    data_files: str | list | dict | None = None
    columns: list[str] | None = None
    label: str | None = None

    def __post_init__(self):  # of values that were checked
        pass

    def where(self, number):
        """A row, for messages."""
        return f"Row {number}" if self.label is None else f"Row {number} of `{self.label}`"


def _entry(value, number):
    """A [`DatasetEntry`] of what a recipe, the command line or Python gives."""
    if isinstance(value, DatasetEntry):
        return value
    if dataclasses.is_dataclass(value):  # TRL's own
        value = dataclasses.asdict(value)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("{") else {"path": value}
        except ValueError as error:
            raise ValueError(f"`datasets[{number}]` is `{value}`, which is no JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"`datasets[{number}]` is {value!r}: give an entry with a `path`, or a path.")
    known = [item.name for item in dataclasses.fields(DatasetEntry) if item.name != "fraction"]
    for key in value:
        if key not in (*known, "fraction"):
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean `{near[0]}`? The" if near else "the"
            raise ValueError(f"`datasets[{number}]` has the unknown key `{key}`: {hint} keys are {', '.join(known)}.")
    if "path" not in value:
        raise ValueError(f"`datasets[{number}]` has no `path`: give a file, a folder or a data set.")
    return DatasetEntry(**value)


def _labels(entries):
    """A name for each entry that no other has."""
    names = []
    for entry in entries:
        more = [part for part in (entry.name, entry.split if entry.split != "train" else None) if part]
        names.append(f"{entry.path} ({', '.join(more)})" if more else entry.path)
    seen = collections.Counter()
    for place, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            names[place] = f"{name} #{seen[name]}"
    return names


@dataclass
class PromptArguments(DataArguments):
    """[`DataArguments`] of a command that answers prompts, of which each answer of a conversation has its own."""

    multi_turn: str = field(default="expand", metadata={"choices": ["expand"]})
