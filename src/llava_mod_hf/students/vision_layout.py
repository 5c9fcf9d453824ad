"""Vision encoders: how many features an image gives, where they lie, and how an encoder is loaded."""

import contextlib
import copy
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import MODEL_MAPPING, AutoImageProcessor
from transformers.utils import logging

from llava_mod_hf.hub_reading import NotRead, told_when_the_hub_fails

# where a LLaVA, a CLIP or a SigLIP keeps its vision encoder
TOWER_PREFIX = r"^(?:(?:model\.)?vision_tower\.(?:vision_model\.)?|vision_model\.)"


@dataclass(frozen=True)
class VisionLayout:
    """
    What of a vision encoder the language model reads.

    Args:
        patch_size (`int`): side of a patch in pixels.
        feature_layer (`int` or `list[int]`): whose hidden states are read.
        select_strategy (`str`): `"default"` leaves the first token, the CLS, out; `"full"` reads all.
        num_additional_tokens (`int`): tokens of the encoder that are no patches: CLS and registers.
        num_image_tokens (`int`): features of an image, and so its placeholders.
    """

    patch_size: int
    feature_layer: int | list[int]
    select_strategy: str
    num_additional_tokens: int
    num_image_tokens: int


def first_sentence(error):
    """The first line of what a library says, which often goes on with a list of all that it knows."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__


def load_part(role, name, load, *args, **kwargs):
    """
    `load(*args, **kwargs)`, where what transformers or the Hub say of a bad name is one sentence.

    Raises:
        ValueError: if the part cannot be loaded.
        ConnectionError, NotRead: if the Hub fails meanwhile, or does not give it.
    """
    with told_when_the_hub_fails(name):
        try:
            return load(*args, **kwargs)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"The {role} `{name}` could not be loaded: {first_sentence(error)}.") from error


@contextlib.contextmanager
def quietly():
    """Without the report on keys that are missing or left over on purpose; the caller checks them."""
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()


def vision_config_of(config):
    """The config of the encoder itself, of that of a CLIP, a SigLIP, a LLaVA or of an encoder alone."""
    return getattr(config, "vision_config", config)


def _vision_class(vision_config, name):
    if type(vision_config) not in MODEL_MAPPING:
        raise ValueError(
            f"The vision tower `{name}` is of type `{vision_config.model_type}`, which is no model of transformers: "
            "give a CLIP, a SigLIP, a DINOv2 or a LLaVA."
        )
    return MODEL_MAPPING[type(vision_config)]


def _processed_size(image_processor, name):
    """Height and width that the image processor makes of any image."""
    # one wide and one tall: a processor that keeps their shape is told by it
    sizes = {
        tuple(image_processor(images=Image.new("RGB", size), return_tensors="pt")["pixel_values"].shape[1:])
        for size in ((96, 64), (64, 96))
    }
    (size, *others) = sizes
    if others or len(size) != 3:
        raise ValueError(
            f"The image processor of `{name}`, {type(image_processor).__name__}, gives `pixel_values` of the shapes "
            f"{sorted(sizes)} for a wide and a tall image: the number of image tokens must not depend on the image, so "
            "take an encoder of fixed resolution."
        )
    return size[1:]


def _tell_size(image_processor, size):
    """
    Writes the size of its pictures where stock `LlavaProcessor._get_num_multimodal_tokens` looks, which servers ask
    for the number of placeholders: at `crop_size` alone, though SigLIP's pictures are resized, not cropped.
    """
    if not getattr(image_processor, "do_center_crop", False):  # else it is so already, and without it no pixel changes
        image_processor.crop_size = {"height": size[0], "width": size[1]}


def vision_layout(vision_config, image_size, *, name=None, feature_layer=None, select_strategy=None):
    """
    How the features of a vision encoder are read, found by running it on the meta device.

    An encoder with a CLS token, such as CLIP and DINOv2, is read at layer −2 without it, as in LLaVA and the paper;
    another, such as SigLIP, at its last layer. Registers, which DINOv2 may have, are read as the patches are.

    Args:
        vision_config (`PreTrainedConfig`): of the encoder.
        image_size (`tuple[int, int]`): height and width of its images in pixels.
        name (`str`, *optional*): what an error calls it.
        feature_layer (`int` or `list[int]`, *optional*): by default as above.
        select_strategy (`str`, *optional*): `"default"` or `"full"`; by default as above.

    Returns:
        [`VisionLayout`].

    Raises:
        ValueError: if the encoder does not give one row of features per patch of such images.
    """
    name = name or vision_config.model_type
    tower_class = _vision_class(vision_config, name)
    described = f"The vision encoder {tower_class.__name__} of `{name}`"
    try:
        with torch.device("meta"), torch.no_grad():
            tower = tower_class._from_config(copy.deepcopy(vision_config))
            output = tower(pixel_values=torch.empty(2, 3, *image_size), output_hidden_states=True)
        hidden_states = output.hidden_states
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"{described} does not read the images of {image_size[0]}×{image_size[1]} pixels that its image processor "
            f"gives ({first_sentence(error)}): take an encoder of fixed resolution, with its own processor."
        ) from error
    patch_size = getattr(vision_config, "patch_size", None)
    if isinstance(patch_size, (list, tuple)) and len(set(patch_size)) == 1:
        (patch_size,) = set(patch_size)
    if not isinstance(patch_size, int):
        raise ValueError(f"{described} has the `patch_size` {patch_size}: LLaVA's processor needs square patches.")

    num_patches = (image_size[0] // patch_size) * (image_size[1] // patch_size)
    shape = tuple(hidden_states[-1].shape) if hidden_states else None
    if shape is None or len(shape) != 3 or shape[0] != 2 or shape[1] < num_patches:
        raise ValueError(
            f"{described} gives features of shape {shape} for 2 images of {num_patches} patches: LLaVA needs one that "
            "keeps a row of features for each patch, such as CLIP, SigLIP or DINOv2."
        )
    additional = shape[1] - num_patches
    if feature_layer is None:
        feature_layer = -2 if additional else -1
    for layer in feature_layer if isinstance(feature_layer, (list, tuple)) else [feature_layer]:
        if not -len(hidden_states) <= layer < len(hidden_states):
            raise ValueError(
                f"`vision_feature_layer` is {feature_layer}, and {described[0].lower()}{described[1:]} has "
                f"{len(hidden_states)} hidden states: give one from {-len(hidden_states)} to {len(hidden_states) - 1}."
            )
    select_strategy = select_strategy or ("default" if additional else "full")
    return VisionLayout(
        patch_size=patch_size,
        feature_layer=feature_layer,
        select_strategy=select_strategy,
        num_additional_tokens=additional,
        num_image_tokens=shape[1] - (select_strategy == "default"),
    )


def load_vision_layout(config, path, *, name, vision_feature_layer=None, trust_remote_code=False):
    """
    Image processor and [`VisionLayout`] of a vision tower; without an image processor in the folder, the config's size.

    Returns:
        `tuple[BaseImageProcessor or None, VisionLayout]`.
    """
    vision_config = vision_config_of(config)
    try:
        with told_when_the_hub_fails(path):
            image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ConnectionError, NotRead):  # nobody knows whether there is one
        raise
    except (OSError, ValueError) as error:
        image_size = getattr(vision_config, "image_size", None)
        if not isinstance(image_size, int):
            raise ValueError(
                f"The vision tower `{name}` has no image processor ({first_sentence(error)}), and its config no single "
                "`image_size`: give a folder with a `preprocessor_config.json`."
            ) from error
        image_processor, size = None, (image_size, image_size)
    else:
        size = _processed_size(image_processor, name)
        _tell_size(image_processor, size)
    # a LLaVA's encoder is read as that LLaVA reads it: the paper's student sees what its teacher sees
    feature_layer = vision_feature_layer if vision_feature_layer is not None else _of_llava(config, "feature_layer")
    strategy = _of_llava(config, "feature_select_strategy")
    return image_processor, vision_layout(
        vision_config, size, name=name, feature_layer=feature_layer, select_strategy=strategy
    )


def _of_llava(config, field):
    return getattr(config, f"vision_{field}", None)


def load_tower(config, path, name, dtype):
    """The encoder alone, of which a LLaVA's or a CLIP's other weights are never read."""
    vision_config = vision_config_of(config)
    with quietly():
        tower, info = load_part(
            "vision tower",
            name,
            _vision_class(vision_config, name).from_pretrained,
            path,
            config=vision_config,
            dtype=dtype,
            key_mapping=None if vision_config is config else {TOWER_PREFIX: ""},
            output_loading_info=True,
        )
    missing = info["missing_keys"]
    if missing:
        raise ValueError(
            f"The vision tower `{name}` lacks {len(missing)} weights of {type(tower).__name__}, among them "
            f"`{min(missing)}`: give a whole checkpoint."
        )
    return tower
