"""The sizes of a repository's weights are those of its files."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from llava_mod_hf.publishing.sizes import size_text, sizes_of
from llava_mod_hf.students.onnx_weights import DTYPES


def test_each_format_has_the_size_of_its_files(tmp_path):
    save_file({"a": np.zeros(100, np.float16), "b": np.zeros(10, np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"c": np.zeros(100, np.float16)}, tmp_path / "model-2.safetensors")
    (tmp_path / "onnx").mkdir()
    graphs = {"model.onnx": 10, "model.onnx_data": 200, "model_quantized.onnx": 4, "head_quantized.onnx": 1}
    graphs |= {"model_q4.onnx": 2, "model_q4.onnx_data": 30, "embed_tokens.onnx": 5}
    others = {"a-Q8_0.gguf": 77, "b.gguf": 8}
    for name, size in {**{f"onnx/{name}": size for name, size in graphs.items()}, **others}.items():
        (tmp_path / name).write_bytes(bytes(size))
    weights = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert sizes_of(tmp_path) == [
        ("safetensors, F16 and F32", weights),
        ("ONNX, fp32", 215),
        ("ONNX, q8", 5),
        ("ONNX, q4", 32),
        ("GGUF, `a-Q8_0.gguf`", 77),
        ("GGUF, `b.gguf`", 8),
    ]


def test_graphs_are_told_by_the_types_that_the_export_writes(tmp_path):
    for ending in DTYPES.values():
        (tmp_path / f"embed_tokens{ending}.onnx").write_bytes(b"x")
    assert sorted(sizes_of(tmp_path)) == sorted((f"ONNX, {name}", 1) for name in DTYPES)


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 bytes"), (1_500, "1.5 kB"), (2_340_000, "2.3 MB"), (14_000_000_000, "14.0 GB")]
)
def test_a_size_is_readable(size, text):
    assert size_text(size) == text
