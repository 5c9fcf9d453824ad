"""Models and processors by their names: of the Hub, of a folder, or `embedded:…`."""

import json
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, ProcessorMixin
from transformers.quantizers.auto import AutoQuantizationConfig

PREFIX = "embedded:"

WEIGHTS = Path(__file__).parent / "weights"


def resolve(name):
    """
    Local folder of an `embedded:…` model name; any other name is returned as it is.

    Raises:
        ValueError: if there is no such embedded model.
    """
    if not name.startswith(PREFIX):
        return name
    folder = WEIGHTS / name.removeprefix(PREFIX)
    if not (folder / "config.json").is_file():
        known = sorted(PREFIX + path.parent.name for path in WEIGHTS.glob("*/config.json"))
        raise ValueError(f"There is no model `{name}`: the embedded ones are {', '.join(known) or 'not built yet'}.")
    return str(folder)


BITS = {
    "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "4bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def load_model_and_processor(
    name, *, dtype="float32", attn_implementation=None, quantization=None, device=None, trust_remote_code=False
):
    """
    A LLaVA and its processor.

    Args:
        name (`str`): Hub name, folder or `embedded:…` name.
        dtype (`str`, *optional*, defaults to `"float32"`): of the weights in memory.
        attn_implementation (`str`, *optional*): as in transformers, such as `"sdpa"` or `"eager"`.
        quantization (`str`, *optional*): as for [`quantization_config`].
        device (`str`, *optional*): where the weights go, as transformers' `device_map`, such as `"cuda:1"` or `"auto"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether code from that repository may run.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`.

    Raises:
        ValueError: if the folder has no processor, only a tokenizer, or the quantisation is unknown or not installed.
    """
    path = resolve(name)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config(quantization),
            device_map=device,
            trust_remote_code=trust_remote_code,
        )
    except ImportError as error:
        if quantization is None:
            raise
        raise ValueError(f"Quantising `{name}` by `{quantization}` needs a library ({error}): install it.") from error
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except ImportError as error:  # of a processor with a part for videos
        raise ValueError(f"The processor of `{name}` needs a library ({' '.join(str(error).split())}).") from error
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"`{name}` comes with a {type(processor).__name__}, not with a processor of text and images: save the "
            "processor beside the model with `processor.save_pretrained`."
        )
    return model, processor


def quantization_config(quantization):
    """
    A quantisation of transformers out of one option of a recipe.

    Args:
        quantization (`str` or `None`):
            `"8bit"` or `"4bit"` (bitsandbytes, NF4), or the JSON of any other configuration of transformers, with its
            `quant_method`, such as `{"quant_method": "quanto", "weights": "int8"}`.

    Returns:
        [`~transformers.utils.quantization_config.QuantizationConfigMixin`] or `None`.

    Raises:
        ValueError: if it is neither.
    """
    if quantization is None:
        return None
    if quantization in BITS:
        return BITS[quantization]()
    try:
        return AutoQuantizationConfig.from_dict(json.loads(quantization))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The quantisation `{quantization}` is none of {', '.join(BITS)} and no configuration of transformers as "
            f"JSON ({error})."
        ) from error
