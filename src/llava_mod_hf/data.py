"""Data sets → rows in TRL's formats, checked before training starts."""

import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Image, List, load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from llava_mod_hf import embedded

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class DataArguments:
    """
    Which rows.

    Args:
        dataset_name (`str`):
            `embedded:easy-vqa`, a local `.json`, `.jsonl` or `.parquet` file, or a data set of the Hub, with rows in
            TRL's formats: `images` with `prompt` and `completion`, or with `prompt`, `chosen` and `rejected`.
        dataset_config (`str`, *optional*): configuration of the data set, such as `questions` of the embedded one.
        dataset_train_split (`str`, *optional*, defaults to `"train"`).
        dataset_test_split (`str`, *optional*, defaults to `"test"`): what `evaluate` reads.
        image_folder (`str`, *optional*): where relative image paths of a local file start; none may leave it.
        max_samples (`int`, *optional*): take the first rows only.
    """

    dataset_name: str = field(metadata={"help": "embedded:easy-vqa, a local file, or a data set of the Hub"})
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    image_folder: str | None = None
    max_samples: int | None = None


def load_rows(args, *, columns, split=None, seed=0):
    """
    The rows that a stage trains on.

    Args:
        args ([`DataArguments`]).
        columns (`tuple[str]`): the columns that the stage needs, such as `("prompt", "completion")`.
        split (`str`, *optional*): by default `args.dataset_train_split`.
        seed (`int`, *optional*, defaults to 0): of the embedded data's thinning.

    Returns:
        `datasets.Dataset` with `images` (lists of PIL images when read) and `columns`.

    Raises:
        ValueError: if the file or a column is missing, an image path leaves the image folder, or an image is missing,
            broken or a decompression bomb.
    """
    split = split or args.dataset_train_split
    path = Path(args.dataset_name)
    if args.dataset_name.startswith(embedded.PREFIX):
        if args.dataset_name != embedded.DATASET:
            raise ValueError(f"There is no data set `{args.dataset_name}`: the embedded one is `{embedded.DATASET}`.")
        dataset = embedded.load(args.dataset_config, split, seed)
    elif path.suffix in READERS:
        if not path.is_file():
            raise ValueError(f"The data file `{path}` does not exist: check `dataset_name`.")
        try:
            dataset = load_dataset(READERS[path.suffix], data_files=str(path), split="train")
        except (DatasetGenerationError, ValueError) as error:
            raise ValueError(f"`{path}` has no rows that can be read ({error.__cause__ or error}).") from error
        dataset = _resolve_images(_first(dataset, args.max_samples), Path(args.image_folder or path.parent))
    else:
        dataset = load_dataset(args.dataset_name, args.dataset_config, split=split)

    missing = [name for name in ("images", *columns) if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`{args.dataset_name}` has the columns {dataset.column_names}, and this stage needs {', '.join(missing)} "
            "as well."
        )
    dataset = _first(dataset, args.max_samples)
    if len(dataset) == 0:
        raise ValueError(f"`{args.dataset_name}` has no rows: nothing to train on.")
    return dataset


def _first(dataset, max_samples):
    return dataset if max_samples is None else dataset.select(range(min(max_samples, len(dataset))))


def _resolve_images(dataset, folder):
    """Relative paths → checked absolute ones, decoded when a row is read; images in the file itself are checked too."""
    if "images" not in dataset.column_names:
        return dataset
    root = folder.resolve()

    def resolve(row, index):
        images = [_resolve_image(image, root, f"Row {index}") for image in row["images"] or []]
        return {"images": images}

    undecoded = dataset.cast_column("images", List(Image(decode=False)))
    # never from the cache: the files may have changed since
    checked = undecoded.map(resolve, with_indices=True, load_from_cache_file=False, desc="Checking images")
    return checked.cast_column("images", List(Image()))


def _resolve_image(image, root, where):
    if image["bytes"] is not None:
        check_image(io.BytesIO(image["bytes"]), f"{where}: image `{image['path'] or 'in the file'}`")
        return image
    path = (root / image["path"]).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{where}: image `{path}` lies outside the image folder `{root}`.")
    if not path.is_file():
        raise ValueError(f"{where}: image `{path}` does not exist.")
    check_image(path, f"{where}: `{path}`")
    return {"bytes": None, "path": str(path)}


def check_image(file, where):
    """
    Reads an image to its end.

    Raises:
        ValueError: if it is no image, truncated, or larger than Pillow's limit against decompression bombs.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its limit
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            with PILImage.open(file) as image:
                if image.format == "PNG":
                    image.verify()  # checksums, without decoding
                else:
                    image.draft("RGB", (1, 1))  # JPEG: decode an eighth of the size; others ignore it
                    image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{where} is not a whole image ({error}): replace it or leave out the row.") from error
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise ValueError(f"{where} is refused as a decompression bomb ({error}).") from error
