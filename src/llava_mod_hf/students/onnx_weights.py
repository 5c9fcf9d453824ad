"""Files of ONNX graphs and their weights."""

LARGEST = 2**31 - 2**20  # a protobuf message has less than 2 GiB: weights of larger graphs lie in a file beside it


def save_graph(proto, path):
    """
    Args:
        proto (`onnx.ModelProto`).
        path (`Path`): ends in `.onnx`.

    Returns:
        `dict[str, int]`: nothing, or of weights in a file of their own the name of the graph's file → 1, as the
        `use_external_data_format` of transformers.js has it.
    """
    import onnx

    if proto.ByteSize() < LARGEST:
        onnx.save(proto, path)
        return {}
    onnx.save(proto, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=1024)
    return {path.name: 1}
