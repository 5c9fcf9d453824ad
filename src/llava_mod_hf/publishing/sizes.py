"""How large a repository's weights are, format by format."""

from collections import Counter

from safetensors import safe_open

# the last ones of a name; an ONNX file may keep its weights in others beside it
FORMATS = {
    "safetensors": ("*.safetensors",),
    "ONNX": ("**/*.onnx", "**/*.onnx_data", "**/*.onnx.data"),
}

GGUF = "**/*.gguf"  # each is a whole model of its own

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def sizes_of(folder):
    """
    Sizes of the weights in a folder.

    Args:
        folder (`Path`): of a checkpoint or a repository.

    Returns:
        `list[tuple[str, int]]`: formats, as a card names them, and bytes.
    """
    found = []
    for name, patterns in FORMATS.items():
        files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        if files:
            dtypes = f", {_dtypes(files)}" if name == "safetensors" else ""
            found.append((name + dtypes, sum(path.stat().st_size for path in files)))
    found += [(f"GGUF, `{path.name}`", path.stat().st_size) for path in sorted(folder.glob(GGUF))]
    return found


def _dtypes(files):
    """The types of the tensors, those of most values first."""
    values = Counter()
    for path in files:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                part = file.get_slice(name)
                count = 1
                for length in part.get_shape():
                    count *= length
                values[part.get_dtype()] += count
    return " and ".join(dtype for dtype, _ in values.most_common())


def size_text(size):
    """`str`: so many bytes, as a reader has them."""
    unit, name = next((each for each in UNITS if size >= each[0]), (1, "bytes"))
    return f"{size / unit:.1f} {name}" if unit > 1 else f"{size} {name}"
