"""Checkpoints of LLaVA-MoD's and MoE-LLaVA's authors, of LLaVA-1.5 and of transformers → a student, its processor."""

import dataclasses
import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llava_mod_hf.loading import resolve
from llava_mod_hf.model.configuration_llava_mod import LlavaModConfig
from llava_mod_hf.model.modeling_llava_mod import LlavaModForConditionalGeneration, logit_transform
from llava_mod_hf.students.build import IMAGE_TOKEN, make_processor, student_config
from llava_mod_hf.students.conversion_layouts import CONVERSATIONS, VISION_TOWER, plan, read_layout
from llava_mod_hf.students.generation import prepare_generation
from llava_mod_hf.students.stock_export import empty_model
from llava_mod_hf.students.vision_layout import load_part, load_tower, load_vision_layout, vision_config_of

STOCK_ONLY = ("model_type", "architectures")

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def chat_template(separator):
    """
    The prompts that LLaVA-1.5, MoE-LLaVA and LLaVA-MoD are trained with, as a Jinja template.

    The system sentence, then `USER: … ASSISTANT: …<separator>` for every pair; the images of a message come first, with
    one newline after them (the repositories' `conversation.py`, style `TWO`, and `preprocess_multimodal`).

    Args:
        separator (`str`): what ends an answer; see [`~llava_mod_hf.students.conversion_layouts.CONVERSATIONS`].
    """
    parts = "message['content'] if message['content'] is not string else [{'type': 'text', 'text': message['content']}]"
    images = (
        "{% for part in parts if part['type'] == 'image' %}<image>{% if loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    )
    text = "{% for part in parts if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    return (
        "{% if messages[0]['role'] != 'system' %}" + SYSTEM + " {% endif %}"
        "{% for message in messages %}{% set parts = " + parts + " %}"
        "{% if message['role'] == 'assistant' %}ASSISTANT:{% generation %}{{ ' ' }}"
        + text
        + separator
        + "{% endgeneration %}"
        "{% else %}{% if message['role'] == 'user' %}USER: {% endif %}" + images + text + "{{ ' ' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def convert_checkpoint(
    checkpoint, *, vision_tower=None, tokenizer=None, conversation=None, chat_template_path=None, dtype=None
):
    """
    A student from a checkpoint of another layout, and its processor.

    The weights are read file by file into the new model, mapped from disk: never the whole checkpoint twice in memory.

    Args:
        checkpoint (`str`):
            Folder of a LLaVA-MoD, MoE-LLaVA or LLaVA-1.5 checkpoint in its authors' layout, or of a stock one of
            transformers (`llava-hf`).
        vision_tower (`str`, *optional*):
            Folder or Hub name of the vision encoder, by default the one that the config names. Its config and image
            processor are read from there, and its weights if the checkpoint has none.
        tokenizer (`str`, *optional*):
            Folder or Hub name of the tokenizer; by default the checkpoint's.
        conversation (`str`, *optional*):
            One of [`~llava_mod_hf.students.conversion_layouts.CONVERSATIONS`]; by default that of the language
            model's family.
        chat_template_path (`str`, *optional*):
            Jinja template instead of that of a conversation.
        dtype (`str`, *optional*):
            Of the weights, such as `"bfloat16"`; by default as they are stored.

    Returns:
        `tuple[LlavaModForConditionalGeneration, LlavaProcessor]`.

    Raises:
        ValueError: if the layout is not one of those, the config asks for what the student cannot do, a weight is
            missing, left over or of another shape, or a file cannot be read.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise ValueError(f"`{checkpoint}` has no `config.json`: give the folder of a checkpoint.")
    if conversation is not None and conversation not in CONVERSATIONS:
        raise ValueError(f"`conversation` is {conversation!r}: give one of {', '.join(CONVERSATIONS)}.")
    if dtype is not None and not getattr(getattr(torch, dtype, None), "is_floating_point", False):
        raise ValueError(f"`dtype` is {dtype!r}: give a floating-point type of torch, such as float32 or bfloat16.")
    values = json.loads((folder / "config.json").read_text())
    template = Path(chat_template_path).read_text() if chat_template_path else None
    if "text_config" in values:
        given = {"vision_tower": vision_tower, "tokenizer": tokenizer, "conversation": conversation}
        return _convert_stock(folder, values, template, dtype, [name for name, value in given.items() if value])

    layout = read_layout(values, checkpoint)
    tokenizer, ends = _load_tokenizer(
        resolve(tokenizer or str(checkpoint)), template, conversation or layout.family.conversation
    )
    tower_name = resolve(vision_tower or layout.vision_tower)
    tower_config = load_part("vision encoder", tower_name, AutoConfig.from_pretrained, tower_name)
    image_processor, vision = _vision(tower_config, tower_name, layout)
    files = weight_files(folder)
    shapes, stored = _shapes(files)
    text_config = CONFIG_MAPPING[layout.family.text_model_type](**layout.text_config)
    config = student_config(
        vision_config_of(tower_config),
        text_config,
        vision,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    model = empty_model(LlavaModForConditionalGeneration, config, dtype=getattr(torch, dtype) if dtype else stored)
    own_tower = any(VISION_TOWER.match(name) for name in shapes)
    _fill(model, files, place_weights(model, shapes, layout, own_tower=own_tower))
    if not own_tower:
        tower = load_tower(tower_config, tower_name, tower_name, model.dtype)
        model.model.vision_tower.load_state_dict(tower.state_dict())
    model.config.vision_config.name_or_path = ""  # it is saved with the student, and may be a folder of this machine
    _add_rows(model, tokenizer)
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = make_processor(image_processor, tokenizer, vision)
    prepare_generation(model, processor)
    return model.eval(), processor


def _load_tokenizer(name, template, conversation):
    """The tokenizer with an `<image>` token and a chat template, and the ids that end an answer."""
    tokenizer = load_part("tokenizer of", name, AutoTokenizer.from_pretrained, name)
    ends = [tokenizer.eos_token_id]
    if template is None:
        separator = CONVERSATIONS[conversation]
        if separator not in tokenizer.get_vocab():
            raise ValueError(
                f"The tokenizer of `{name}` has no {separator!r}, which ends an answer in the conversation "
                f"{conversation!r}: give another `conversation`, a `chat_template_path`, or the right `tokenizer`."
            )
        template = chat_template(separator)
        ends.insert(0, tokenizer.convert_tokens_to_ids(separator))
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = template
    return tokenizer, [end for end in dict.fromkeys(ends) if end is not None]


def place_weights(model, shapes, layout, *, own_tower=True):
    """
    [`~llava_mod_hf.students.conversion_layouts.plan`] for a student.

    Args:
        model (`LlavaModForConditionalGeneration`): may be on the meta device.
        shapes (`dict[str, tuple]`): of the checkpoint's weights.
        layout ([`~llava_mod_hf.students.conversion_layouts.Layout`]).
        own_tower (`bool`, *optional*, defaults to `True`): whether the checkpoint has to hold the vision encoder.
    """
    targets = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    packed = {
        f"{name}.{parameter}": parts
        for name, module in model.named_modules()
        if hasattr(module, "sources")
        for parameter, parts in module.sources().items()
    }
    absent = [*layout.family.absent]
    if not own_tower:
        absent += [name for name in targets if name.startswith("model.vision_tower.")]
    if model.config.text_config.tie_word_embeddings:
        absent.append("lm_head.weight")
    return plan(shapes, targets, packed, absent=absent)


def weight_files(folder):
    """
    Files of a checkpoint's weights, in order.

    Raises:
        ValueError: if there are none, or one that the index names is missing.
    """
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ValueError(f"`{folder}` lacks {', '.join(missing)}, which `{index.name}` names.")
            return files
        if (folder / name).is_file():
            return [folder / name]
    raise ValueError(f"`{folder}` has no weights: neither {' nor '.join(WEIGHT_FILES)}, whole or with an index.")


def _read(file):
    """
    `(name, tensor)` of a file, mapped from disk; nothing but tensors is ever unpickled.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                yield from ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118 (no mapping)
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"`{file}` cannot be read as weights ({reason}): it is cut off, or not a plain checkpoint."
        ) from error


def _shapes(files):
    """Shapes of the weights by name, and the type of the embeddings."""
    shapes, dtype = {}, None
    for file in files:
        for name, tensor in _read(file):
            shapes[name] = tuple(tensor.shape)
            dtype = tensor.dtype if name.endswith("embed_tokens.weight") else dtype
    return shapes, dtype


@torch.no_grad()
def _fill(model, files, slots):
    parameters = model.state_dict()
    if "lm_head.bias" in parameters:
        parameters["lm_head.bias"].zero_()  # of Phi, whose head has none in this layout
    tied = model.config.text_config.tie_word_embeddings
    head, embeddings = "lm_head.weight", parameters["model.language_model.embed_tokens.weight"]
    for file in files:
        for name, tensor in _read(file):
            if name in slots and not (tied and name == head):
                parameter, index = slots[name]
                parameters[parameter][index].copy_(tensor)
    for file in files if tied and head in slots else ():
        for name, tensor in _read(file):
            if name == head and not torch.equal(embeddings, tensor.to(embeddings.dtype)):
                raise ValueError(
                    "The config ties the head to the embeddings (`tie_word_embeddings`), but the checkpoint's "
                    "`lm_head.weight` is another one: correct the config."
                )


def _vision(tower_config, tower_name, layout):
    """Image processor and reading of the vision encoder, as the checkpoint's config says."""
    image_processor, found = load_vision_layout(
        tower_config, tower_name, name=tower_name, vision_feature_layer=layout.feature_layer
    )
    if image_processor is None:
        raise ValueError(f"The vision encoder `{tower_name}` has no image processor: give a `vision_tower` with one.")
    tokens = found.num_image_tokens + (found.select_strategy == "default")
    vision = dataclasses.replace(
        found,
        select_strategy=layout.select_strategy,
        num_image_tokens=tokens - (layout.select_strategy == "default"),
    )
    if layout.pad_to_square:
        settings = image_processor.to_dict()
        for name in ("image_processor_type", "do_pad", "pad_size"):
            settings.pop(name, None)
        image_processor = LlavaImageProcessorPil(**settings, do_pad=True)
    return image_processor, vision


@torch.no_grad()
def _add_rows(model, tokenizer):
    """
    Gives tokens without a row in the embeddings one, the mean of all.

    The mean row's logit is the mean logit, so that its probability is below 1 / vocabulary (Jensen): the distribution
    over the old tokens stays, up to that share. `generate` never writes one of them.
    """
    size = model.config.text_config.vocab_size
    if len(tokenizer) <= size:
        return
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in (module.weight, getattr(module, "bias", None)):
            if parameter is not None:
                parameter[size:] = parameter[:size].float().mean(0)
    model.generation_config.suppress_tokens = list(range(size, len(tokenizer)))


def _convert_stock(folder, values, template, dtype, given):
    if values.get("model_type") != "llava":
        raise ValueError(f"`{folder}` has `model_type` {values.get('model_type')!r}: of stock models give a `llava`.")
    if given:
        raise ValueError(f"`{folder}` is a stock LLaVA that brings its own parts: leave out {', '.join(given)}.")
    stock, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
    wrong = {what: sorted(map(str, info[f"{what}_keys"])) for what in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        raise ValueError(f"`{folder}` does not fit its config: " + "; ".join(f"{k} {v}" for k, v in wrong.items() if v))
    fields = {name: value for name, value in stock.config.to_dict().items() if name not in STOCK_ONLY}
    if fields["text_config"].get("final_logit_softcapping"):
        fields["text_config"]["final_logit_softcapping"] = None  # Gemma 2's, which stock LLaVA leaves out
    config = LlavaModConfig(**fields)
    if logit_transform(config.text_config) != (1.0, None):
        raise ValueError(f"`{folder}`: stock LLaVA does not scale the logits as its language model's family does.")
    model = empty_model(LlavaModForConditionalGeneration, config, dtype=stock.dtype)
    weights = stock.state_dict()
    if "lm_head.bias" in model.state_dict():
        weights["lm_head.bias"] = torch.zeros_like(model.lm_head.bias)  # Phi's, which stock LLaVA leaves out
    model.load_state_dict(weights, assign=True)  # the same tensors, not a copy
    model.tie_weights()
    model.generation_config = stock.generation_config
    processor = AutoProcessor.from_pretrained(folder)
    if template:
        processor.chat_template = processor.tokenizer.chat_template = template
    prepare_generation(model, processor)
    return model.eval(), processor
