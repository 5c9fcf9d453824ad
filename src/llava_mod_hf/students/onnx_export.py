"""The folder that transformers.js loads as `model_type: llava`: ONNX graphs, and configs as it reads them."""

import importlib.util
import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from llava_mod_hf.students.onnx_graphs import graphs
from llava_mod_hf.students.onnx_weights import DTYPES, write_graph

# transformers.js 4.3.2, `src/configs.js`: language models whose number of layers it finds, if a student can have them.
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "smollm3", "stablelm",
    "olmo2", "olmo3", "cohere", "cohere2", "granite", "helium", "glm", "ministral", "starcoder2", "arcee",
)  # fmt: skip

# Its image processors that do what those of transformers do: resize, crop, rescale, normalise.
IMAGE_PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor", "ViTImageProcessor")

NEEDS = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(model, processor, folder, *, dtypes=("fp32",)):
    """
    Writes what transformers.js 4 loads with `AutoModelForImageTextToText` and `AutoProcessor`.

    Args:
        model (`PreTrainedModel`): a LLaVA in float32: a student, dense or sparse, or a stock one; left unchanged.
        processor (`ProcessorMixin`): its processor.
        folder (`str` or `Path`): must not exist, or be empty.
        dtypes (`Sequence[str]`, *optional*, defaults to `("fp32",)`):
            Files of which weights to write, of `fp32`, `fp16`, `q8` and `q4`
            ([`~llava_mod_hf.students.onnx_weights.write_graph`]); the first is loaded where nobody asks for another.

    Raises:
        ValueError: if the folder has files, a kind of weights is unknown or named twice, a library is missing, or
            transformers.js has no such language model, image processor or tokenizer.
    """
    folder = Path(folder)
    check_can_write(folder, dtypes)
    _check_model(model)
    _check_processor(processor)
    blank = processor.image_processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]

    unfinished, external = folder.with_name(f"{folder.name}.unfinished"), {}
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "onnx").mkdir(parents=True)
    try:
        for name, proto in graphs(model, blank.shape[1:]):
            external |= write_graph(proto, unfinished / "onnx", name, dtypes)
        _write_config(model, unfinished, dtypes, external)
        _write_processor(processor, unfinished, blank.shape[-2:], _number_of_features(model, blank))
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_can_write(folder, dtypes):
    """
    Raises:
        ValueError: if the folder has files, a kind of weights is unknown or named twice, or a library that writes
            graphs is not installed.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`{folder}` is there already: give a new or empty folder as `output_dir`.")
    if not dtypes or len(set(dtypes)) < len(dtypes) or not set(dtypes) <= set(DTYPES):
        raise ValueError(f"`onnx_dtypes` is {list(dtypes)}: give one or more of {', '.join(DTYPES)}, each once.")
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"ONNX files are written with {', '.join(NEEDS)}, of which {', '.join(missing)} is not installed: run "
            "`pip install llava-mod-hf[onnx]`."
        )


def _check_model(model):
    kind = model.config.text_config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"The language model is of the family `{kind}`, and transformers.js loads LLaVAs of {', '.join(FAMILIES)}: "
            "take a student of one of those."
        )
    if model.dtype != torch.float32:
        raise ValueError(f"The weights are in {model.dtype}: load them in float32, from which the others are made.")


def _check_processor(processor):
    image_processor = getattr(processor, "image_processor", None)
    tokenizer = getattr(processor, "tokenizer", None)
    if image_processor is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"The processor is a {type(processor).__name__}, which is not one of pictures and text: give the one that "
            "the student was saved with."
        )
    kind = _image_processor_type(image_processor)
    if kind not in IMAGE_PROCESSORS:
        raise ValueError(
            f"The image processor is a {kind}, and what transformers.js does with pictures is the same for "
            f"{', '.join(IMAGE_PROCESSORS)} alone: build the student with one of those."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer is a {type(tokenizer).__name__} without a `tokenizer.json`, and transformers.js reads no "
            "other file: give a fast one."
        )


def _image_processor_type(image_processor):
    values = image_processor.to_dict()
    return values.get("image_processor_type", type(image_processor).__name__).removesuffix("Fast").removesuffix("Pil")


@torch.no_grad()
def _number_of_features(model, pixel_values):
    return len(model.model.get_image_features(pixel_values, return_dict=True).pooler_output[0])


def _write_config(model, folder, dtypes, external):
    values = model.config.to_dict()
    for name in ("auto_map", "dtype", "_name_or_path"):
        values.pop(name, None)
    values |= {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    # what a browser would load otherwise is `q8`, whether the file is there or not
    values["transformers.js_config"] = {"dtype": dtypes[0]}
    if external:
        values["transformers.js_config"]["use_external_data_format"] = external
    _write_json(folder / "config.json", values)
    model.generation_config.save_pretrained(folder)


def _write_processor(processor, folder, size, features):
    processor.save_pretrained(folder)
    image_processor = processor.image_processor.to_dict()
    kind = _image_processor_type(processor.image_processor)
    image_processor |= {"image_processor_type": kind, "processor_class": "LlavaProcessor"}
    _write_json(folder / "preprocessor_config.json", image_processor)

    values = json.loads((folder / "processor_config.json").read_text())
    # transformers.js adds this number to the patches of a picture, and looks at no strategy
    grid = (size[0] // processor.patch_size) * (size[1] // processor.patch_size)
    values |= {"num_additional_image_tokens": features - grid, "vision_feature_select_strategy": "full"}
    _write_json(folder / "processor_config.json", values)

    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values |= {"padding_side": "left", "chat_template": processor.chat_template or processor.tokenizer.chat_template}
    if values.get("tokenizer_class") == "TokenizersBackend":  # whatever `tokenizer.json` says
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(path, values)


def _write_json(path, values):
    path.write_text(json.dumps(values, indent=2) + "\n")
