"""How large a repository's weights are, format by format."""

from collections import Counter

from safetensors import safe_open

ONNX = ("**/*.onnx", "**/*.onnx_data", "**/*.onnx.data")  # the weights of a graph may be in a file beside it

# how transformers.js names the file of a graph whose weights are of another type than float32: its name ends so
ONNX_TYPES = {"fp16": "fp16", "quantized": "q8", "q4": "q4", "q4f16": "q4f16", "int8": "int8", "uint8": "uint8"}

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
    if files := sorted(folder.glob("*.safetensors")):
        found.append((f"safetensors, {_dtypes(files)}", sum(path.stat().st_size for path in files)))
    graphs = Counter()  # each type is a whole model of its own
    for path in sorted({path for pattern in ONNX for path in folder.glob(pattern)}):
        kind = ONNX_TYPES.get(path.name.partition(".")[0].rpartition("_")[-1], "fp32")
        graphs[f"ONNX, {kind}"] += path.stat().st_size
    found += graphs.items()
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
