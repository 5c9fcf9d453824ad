"""Rows whose images nobody has read yet."""

import functools

from datasets import Features, Image, IterableDataset, List


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
        # before the library reads them, in threads of its own: what it has read it writes anew, as a PNG
        mapped = dataset.decode(False).map(function, **{**kwargs, "features": _undecoded(features)})
        return _decoded(mapped, features)
    # Arrow tables as they are; casting a column of lists would write the whole data set anew
    mapped = dataset.with_format("arrow").map(
        functools.partial(_on_table, function),
        num_proc=num_proc,
        desc=desc,
        load_from_cache_file=load_from_cache_file,
        **kwargs,
    )
    return mapped.with_format(None)


def filter_undecoded(stream, keep, *, input_columns, **kwargs):
    """`stream.filter` by columns that are no images, which `datasets` would decode first, all of a row."""
    return _decoded(stream.decode(False).filter(keep, input_columns=input_columns, **kwargs), stream.features)


def _undecoded(features):
    unread = Image(decode=False)
    kinds = ((Image(), unread), (List(Image()), List(unread)))
    return Features({name: next((to for of, to in kinds if of == each), each) for name, each in features.items()})


def _decoded(stream, features):
    """A stream whose images are read when a row is, where `features` say so."""
    for name, feature in features.items():
        if feature in (Image(), List(Image())):
            stream = stream.cast_column(name, feature)
    return stream


def _on_table(function, batch, indices):
    return function(batch.to_pydict(), indices)
