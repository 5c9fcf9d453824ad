"""Models and processors by their names: of the Hub, of a folder, or `embedded:…`."""

import json
import logging
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, ProcessorMixin
from transformers.quantizers.auto import AutoQuantizationConfig

from llava_mod_hf.hub_reading import told_when_the_hub_fails

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


class _Report(logging.Handler):
    """
    Keeps what transformers reports of a loading: of experts of which some are missing, its error names none.

    Within the context the report is written whatever the verbosity is, and where that is low, for this alone.
    """

    def __init__(self):
        super().__init__()
        self.text, self.logger = "", logging.getLogger("transformers.modeling_utils")

    def emit(self, record):
        self.text += record.getMessage()

    def __enter__(self):
        self.before = self.logger.level, self.logger.propagate
        if not self.logger.isEnabledFor(logging.WARNING):
            self.logger.setLevel(logging.WARNING)
            self.logger.propagate = False
        self.logger.addHandler(self)
        return self

    def __exit__(self, *error):
        self.logger.removeHandler(self)
        self.logger.setLevel(self.before[0])
        self.logger.propagate = self.before[1]


def load_whole(auto_class, path, **kwargs):
    """
    `auto_class.from_pretrained`, which initialises what a checkpoint lacks: a student with a new router or norm would
    answer at random, so here it is refused.

    Args:
        auto_class (`type`): such as `AutoModelForImageTextToText`.
        path (`str` or `os.PathLike`): folder or Hub name.
        kwargs: of `from_pretrained`.

    Returns:
        `PreTrainedModel`.

    Raises:
        ValueError: if a file cannot be read, or weights are missing, of another shape or not finite; it names them.
        ConnectionError: if the Hub fails while it is read.
    """
    report = _Report()
    try:
        with (
            report,
            told_when_the_hub_fails(path),
        ):  # mismatched sizes ignored, or another shape would be an error that names none
            model, info = auto_class.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except (RuntimeError, SafetensorError, EOFError, UnpicklingError) as error:
        _refuse_missing(path, re.findall(r"^(\S+) +\| CONVERSION", report.text, flags=re.M))
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in OF_A_FILE):
            raise  # of a device, or of its memory
        raise ValueError(f"The weights of `{path}` are cut off or of another model: {_reason(error)}") from error
    _refuse_missing(path, {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    _refuse_not_finite(path, model)
    return model


OF_A_FILE = (
    "PytorchStreamReader",
    "loading state_dict",
    "conversion of the weights",
)  # PyTorch's and transformers' words


def _reason(error):
    """What an error says, in one line; some say nothing, and some a page."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _refuse_missing(path, names):
    if names:
        shown = ", ".join(sorted(names)[:8]) + (", …" if len(names) > 8 else "")
        raise ValueError(
            f"`{path}` has {len(names)} of the model's weights not at all, in part or in another shape: {shown}. It is "
            "cut off or of another model."
        )


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # those of 8 bits have no such check


def _refuse_not_finite(path, model):
    """Such weights are those of a run that diverged: every answer is then the same, and every score looks possible."""
    # quantised ones are of other classes, which cannot be asked, and were made of weights that were finite
    kinds = (torch.Tensor, torch.nn.Parameter)
    plain = {name: p for name, p in model.named_parameters() if type(p) in kinds and type(p.data) is torch.Tensor}
    tensors = {name: p for name, p in plain.items() if p.dtype in FLOATS and not p.is_meta}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"`{path}` has {len(broken)} of {len(tensors)} weights with values that are not finite, `{broken[0]}` "
            "among them: the run that wrote it diverged; take one of its checkpoints from before."
        )


SAVE_PROCESSOR = "save the processor beside the model with `processor.save_pretrained`"


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
        ValueError: as in [`load_whole`], and if it is no vision-language model, or one with code that may not run; if
            the folder has no processor, only a tokenizer; if the device is not there or has no room, or the
            quantisation is unknown or not installed.
    """
    path = resolve(name)
    # an explicit `None` would hide what the checkpoint says of its own weights
    quantised = {} if quantization is None else {"quantization_config": quantization_config(quantization)}
    try:
        model = load_whole(
            AutoModelForImageTextToText,
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            **quantised,
            device_map=device,
            trust_remote_code=trust_remote_code,
        )
    except ImportError as error:
        raise _missing_library(error, name, attn_implementation, quantization) from error
    except torch.OutOfMemoryError as error:
        where = "" if device is None else f" on the device `{device}`"
        raise ValueError(
            f"`{name}` has no room{where} ({_reason(error)}): give a larger or an emptier one, or a smaller `dtype`."
        ) from error
    except ValueError as error:
        if "argument `trust_remote_code=True`" in str(error):  # transformers' words, over several lines
            raise ValueError(
                f"`{name}` brings code of its own: read it, and give `trust_remote_code: true` if it may run."
            ) from error
        if "Unrecognized configuration class" not in str(error):  # its words before a page of names
            raise
        raise ValueError(f"`{name}` is no vision-language model, by its `config.json`: give one.") from error
    except (AssertionError, RuntimeError) as error:  # PyTorch asserts that it was built for a device
        if device is None:
            raise
        raise ValueError(
            f"`{name}` cannot be put on the device `{device}` ({_reason(error)}): give one that is here."
        ) from error
    try:
        with told_when_the_hub_fails(path):
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except OSError as error:
        if not Path(path).is_dir():
            raise
        raise ValueError(f"`{name}` comes without a processor ({_reason(error)}): {SAVE_PROCESSOR}.") from error
    except ImportError as error:  # of a processor with a part for videos
        raise ValueError(f"The processor of `{name}` needs a library ({' '.join(str(error).split())}).") from error
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"`{name}` comes with a {type(processor).__name__}, not with a processor of text and images: "
            f"{SAVE_PROCESSOR}."
        )
    return model, processor


def _missing_library(error, name, attn_implementation, quantization):
    """The error that says which option asked for a library that is not installed."""
    reason = " ".join(str(error).split())
    if quantization is not None:
        return ValueError(f"Quantising `{name}` by `{quantization}` needs a library ({reason}): install it.")
    if attn_implementation is not None:
        return ValueError(
            f"`attn_implementation` is `{attn_implementation}`, which needs a library ({reason}): install it, or leave "
            "the option out."
        )
    return ValueError(f"`{name}` needs a library ({reason}): install it.")


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
