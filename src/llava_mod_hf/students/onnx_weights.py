"""Files of ONNX graphs: weights in float32, and lighter ones by onnxruntime's own tools."""

import contextlib
import copy
import logging
import tempfile
from pathlib import Path

# transformers.js, `src/utils/dtypes.js`: what follows a graph's name in its file's
DTYPES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4"}

LARGEST = 2**31 - 2**20  # a protobuf message has less than 2 GiB: weights of larger graphs lie in a file beside it

BLOCK = 32  # values of a column that share a scale and a zero point in q4

KEPT = (".gate.weight", ".coefficient.weight")  # of routers, a thousandth of the size: rounding flips the choice


def write_graph(proto, folder, name, dtypes):
    """
    Writes a graph once for each kind of weights.

    Inputs and outputs are float32 in all of them, so that kinds can be mixed.

    | kind | weights |
    |---|---|
    | `fp16` | float16, and so is the arithmetic |
    | `q8` | uint8 of matrices and embeddings, scale and zero point per column; inputs rounded to 8 bits as they come |
    | `q4` | 4 bits of the same, a scale and a zero point for each 32 values |

    Args:
        proto (`onnx.ModelProto`): in float32.
        folder (`Path`): where `<name><suffix>.onnx` go.
        name (`str`).
        dtypes (`Sequence[str]`): of `DTYPES`.

    Returns:
        `dict[str, int]`: nothing, or for weights in a file of their own the name of the graph's file → 1, as the
        `use_external_data_format` of transformers.js has it.
    """
    external = {}
    for dtype in dtypes:
        external |= save_graph(_lighter(proto, dtype), folder / f"{name}{DTYPES[dtype]}.onnx")
    return external


def save_graph(proto, path):
    """As [`write_graph`], of one file."""
    import onnx

    if proto.ByteSize() < LARGEST:
        onnx.save(proto, path)
        return {}
    onnx.save(proto, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=1024)
    return {path.name: 1}


def _lighter(proto, dtype):
    make = {"fp32": lambda given: given, "fp16": _halved, "q8": _quantised_to_8, "q4": _quantised_to_4}[dtype]
    with _quiet():
        return make(proto)


def _kept(proto):
    """Names of the products whose matrix stays as it is."""
    return [node.name for node in proto.graph.node if any(name.endswith(KEPT) for name in node.input)]


def _halved(proto):
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    kept = set(_kept(proto))
    # and what comes of a router's logits, their softmax and the bias that is added to it: in half precision two experts
    # may have the same share
    for _ in range(2):
        made = {name for node in proto.graph.node if node.name in kept for name in node.output}
        kept |= {node.name for node in proto.graph.node if made & set(node.input)}
    return convert_float_to_float16(
        copy.deepcopy(proto),
        keep_io_types=True,
        # the experts' sum, which onnxruntime has in float32 alone on a CPU
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, "ScatterND"],
        node_block_list=sorted(kept),
    )


def _quantised_to_8(proto):
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "graph.onnx")
        quantize_dynamic(
            copy.deepcopy(proto),
            path,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            weight_type=QuantType.QUInt8,  # with int8, sums of two products saturate on x86 processors without VNNI
            nodes_to_exclude=_kept(proto),
            use_external_data_format=proto.ByteSize() >= LARGEST,
        )
        return onnx.load(path)


def _quantised_to_4(proto):
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantiser = MatMulNBitsQuantizer(
        copy.deepcopy(proto),
        bits=4,
        block_size=BLOCK,
        is_symmetric=False,
        nodes_to_exclude=_kept(proto),
        op_types_to_quantize=("MatMul", "Gather"),
        quant_axes=(("MatMul", 0), ("Gather", 1)),
    )
    quantiser.process()
    return quantiser.model.model


@contextlib.contextmanager
def _quiet():
    """The quantiser recommends another tool, on the root logger."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
