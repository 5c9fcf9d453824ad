"""Hashes that say whether a value, a processor, weights or a row are the same."""

import hashlib
import json

import torch
from safetensors import safe_open
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def content_hash(value):
    """Sixteen hexadecimal digits that say whether a value, of what JSON can write, is the same."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def processor_parts(processor):
    """
    What decides which tensors a processor makes of a conversation, as a hash for each part.

    Returns:
        `dict[str, str]`: `tokenizer`, `chat_template`, `image_processor` and `image_tokens` → hash.
    """
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    # not properties of the tokenizer: each call sets them anew
    tokenizer = {key: value for key, value in tokenizer.items() if key not in ("truncation", "padding")}
    images = processor.image_processor.to_dict()
    # its class is another without torchvision
    images = {key: value for key, value in images.items() if key not in ("image_processor_type", "processor_class")}
    if not images.get("do_center_crop"):
        images.pop("crop_size", None)  # crops nothing: servers read the size of a picture there
    names = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "image_token")
    return {
        "tokenizer": content_hash(tokenizer),
        "chat_template": content_hash(processor.chat_template),
        "image_processor": content_hash(images),
        "image_tokens": content_hash([type(processor).__name__, *(getattr(processor, n, None) for n in names)]),
    }


TEXT_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")


# --- what determines the answers ---


def weights_hash(folder):
    """
    A hash of a model's tensors, whatever files they are in.

    Args:
        folder (`Path`): with its safetensors.

    Returns:
        `str`: sixteen hexadecimal digits.

    Raises:
        ValueError: if there are none.
    """
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                tensors[key] = _tensor_parts(file.get_tensor(key))
    if not tensors:
        raise ValueError(f"`{folder}` has no safetensors to tell its weights by: save it with `save_pretrained`.")
    return content_hash(tensors)


def _tensor_parts(tensor):
    if is_traceable_wrapper_subclass(tensor):  # such as torchao's quantised weights
        return [_tensor_parts(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return [str(tensor.dtype), list(tensor.shape), hashlib.blake2b(content, digest_size=16).hexdigest()]


# of a model's config, what has no influence on its logits or is an option of its own
VOLATILE = {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def config_hash(config):
    """A hash of what in a model's config has an influence on its logits."""
    return content_hash(_without_volatile(config.to_dict()))


def _without_volatile(value):
    if isinstance(value, dict):
        return {key: _without_volatile(part) for key, part in value.items() if key not in VOLATILE}
    return value


def model_hash(model):
    """A hash of a model in memory, whatever it was loaded from: its config, and its tensors in their precision."""
    return content_hash([config_hash(model.config), _tensors_of(model)])


def tensors_hash(module):
    """A hash of a module's tensors in memory, in their precision."""
    return content_hash(_tensors_of(module))


def _tensors_of(module):
    return {
        name: _tensor_parts(tensor.detach().cpu())
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }


# --- rows ---

ROW_KEY_VERSION = 2  # to be raised with every change of what `row_key` returns


def row_text_key(row):
    """Sixteen hexadecimal digits of the words of a row."""
    return content_hash({name: row[name] for name in TEXT_COLUMNS if row.get(name) is not None})


def row_key(row):
    """
    What a row is found by, whatever its place: a hash of its words and one of its images.

    Args:
        row (`dict`): as the data set yields it, with `images` or `image` (PIL) and columns of TRL's formats.

    Returns:
        `str`: 33 characters.
    """
    digest = hashlib.blake2b(digest_size=8)
    images = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
    for image in images:
        digest.update(f"{image.size}".encode())
        # some processors lay a picture on white where it is transparent
        digest.update(image.convert("RGBA" if image.has_transparency_data else "RGB").tobytes())
    return f"{row_text_key(row)}-{digest.hexdigest()}"
