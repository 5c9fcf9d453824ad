"""Image files that rows name: inside their folder, whole, and no decompression bombs."""

import functools
import io
import warnings

from datasets import Image, IterableDataset, List
from PIL import Image as PILImage
from PIL import UnidentifiedImageError


def map_undecoded(dataset, function, *, features, num_proc=None, desc=None, load_from_cache_file=None, **kwargs):
    """
    `dataset.map` in batches whose images are `{"bytes", "path"}` dictionaries, read by nobody yet.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`).
        function (`Callable[[dict, list[int]], dict]`): columns of a batch and its row numbers → all
            columns of the result.
        features (`datasets.Features`): of the result.
        num_proc, desc, load_from_cache_file: as in `datasets.Dataset.map`; a stream has no use for them.
        kwargs: as in `map`.
    """
    kwargs = {"batched": True, "batch_size": 100, "with_indices": True, "features": features, **kwargs}
    if isinstance(dataset, IterableDataset):
        for name, feature in dataset.features.items():
            if feature in (Image(), List(Image())):
                undecoded = Image(decode=False)
                dataset = dataset.cast_column(name, undecoded if feature == Image() else List(undecoded))
        return dataset.map(function, **kwargs)
    # Arrow tables as they are; casting a column of lists would write the whole data set anew
    mapped = dataset.with_format("arrow").map(
        functools.partial(_on_table, function),
        num_proc=num_proc,
        desc=desc,
        load_from_cache_file=load_from_cache_file,
        **kwargs,
    )
    return mapped.with_format(None)


def _on_table(function, batch, indices):
    return function(batch.to_pydict(), indices)


def resolve_image(image, root, where, *, whole=True):
    """
    Checks an undecoded image.

    Args:
        image (`dict`): `{"bytes", "path"}`; without bytes the path is relative to `root`.
        root (`Path`): a resolved folder.
        where (`str`): the row, for messages.
        whole (`bool`, *optional*, defaults to `True`): as in [`check_image`].

    Returns:
        `dict`: the image, its path absolute.

    Raises:
        ValueError: if the path leaves the folder, or as [`check_image`].
    """
    if image["bytes"] is not None:
        check_image(io.BytesIO(image["bytes"]), f"{where}: image `{image['path'] or 'in the file'}`", whole=whole)
        return image
    path = (root / image["path"]).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{where}: image `{path}` lies outside the image folder `{root}`.")
    if not path.is_file():
        raise ValueError(f"{where}: image `{path}` does not exist.")
    check_image(path, f"{where}: `{path}`", whole=whole)
    return {"bytes": None, "path": str(path)}


def open_image(image):
    """An undecoded image `{"bytes", "path"}` as a PIL image, not yet read."""
    return PILImage.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))


def check_image(file, where, *, whole=True):
    """
    Reads an image, to its end or its header only.

    Args:
        file (`Path` or a file object).
        where (`str`): what the message starts with.
        whole (`bool`, *optional*, defaults to `True`): without it a truncated image is not noticed.

    Raises:
        ValueError: if it is no image, truncated, or larger than Pillow's limit against decompression bombs.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its limit
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            with PILImage.open(file) as image:
                if not whole:
                    return
                if image.format == "PNG":
                    image.verify()  # checksums, without decoding
                else:
                    image.draft("RGB", (1, 1))  # JPEG: decode an eighth of the size; others ignore it
                    image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{where} is not a whole image ({error}): replace it or leave out the row.") from error
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise ValueError(f"{where} is refused as a decompression bomb ({error}).") from error
