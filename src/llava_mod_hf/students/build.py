"""A new student out of a vision encoder and a language model."""

import copy
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlavaProcessor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_mod_hf.loading import resolve
from llava_mod_hf.model.configuration_llava_mod import LlavaModConfig
from llava_mod_hf.model.modeling_llava_mod import LlavaModForConditionalGeneration
from llava_mod_hf.students.generation import prepare_generation
from llava_mod_hf.students.vision_layout import load_part, load_tower, load_vision_layout, quietly, vision_config_of

IMAGE_TOKEN = "<image>"


def _check_chat_template(tokenizer, name):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "!"}]},
    ]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:
        rendered = str(error)
    if rendered.count(IMAGE_TOKEN) != 1:
        raise ValueError(
            f"The chat template of `{name}` does not write one `{IMAGE_TOKEN}` for a message with an image (it gave "
            f"{rendered[:200]!r}): give a template for images with `chat_template_path`."
        )


def _prepare_tokenizer(tokenizer, language_model, name, chat_template):
    """The tokenizer with an `<image>` token and a template that writes it, and a row of embeddings for each token."""
    rows = language_model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer of `{name}` has {len(tokenizer)} tokens and its embeddings have {rows} rows: take the "
            "tokenizer that the language model was trained with."
        )
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    _check_chat_template(tokenizer, name)
    if len(tokenizer) > rows:
        with quietly():
            language_model.resize_token_embeddings(len(tokenizer))


def _load_language_model(language_model, tokenizer, dtype, trust_remote_code):
    """The language model, its tokenizer and what an error calls it; what is given already is copied."""
    if not isinstance(language_model, str):
        name = type(language_model).__name__
        if tokenizer is None:
            raise ValueError(f"The {name} was given without a tokenizer: give `tokenizer` as well.")
        return copy.deepcopy(language_model).to(getattr(torch, dtype)), copy.deepcopy(tokenizer), name
    path, remote = resolve(language_model), {"trust_remote_code": trust_remote_code}
    config = load_part("language model", language_model, AutoConfig.from_pretrained, path, **remote)
    loaded = load_part(
        "language model",
        language_model,
        AutoModelForCausalLM.from_pretrained,
        path,
        config=config,
        dtype=dtype,
        **remote,
    )
    if tokenizer is None:
        tokenizer = load_part("tokenizer of", language_model, AutoTokenizer.from_pretrained, path, **remote)
    return loaded, copy.deepcopy(tokenizer), language_model


def _new_adaptor(config):
    """The adaptor with the weights that the student's class draws for new ones."""
    with torch.device("meta"):
        student = LlavaModForConditionalGeneration._from_config(config)
    adaptor = LlavaMultiModalProjector(config)
    for module in adaptor.modules():
        student._init_weights(module)
    return adaptor


def _assemble(config, tower, language_model, dtype):
    """The student with the weights of both parts, which are not copied, and a new adaptor."""
    parts = {
        "model.vision_tower.": tower,
        "model.multi_modal_projector.": _new_adaptor(config).to(getattr(torch, dtype)),
        "model.language_model.": language_model.base_model,
        "lm_head.": language_model.get_output_embeddings(),
    }
    weights = {prefix + key: value for prefix, part in parts.items() for key, value in part.state_dict().items()}
    with quietly():
        # on the meta device first, then the given tensors take their places
        model, info = LlavaModForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(
            f"{type(language_model).__name__} cannot become a student: weights without a place are "
            f"{sorted(info['unexpected_keys'])[:3]}, and places without weights {sorted(info['missing_keys'])[:3]}."
        )
    return model


def student_config(vision_config, text_config, layout, **fields):
    """[`LlavaModConfig`] of a vision encoder and a language model; `fields` are further ones of it."""
    return LlavaModConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_seq_length=layout.num_image_tokens,
        vision_feature_layer=layout.feature_layer,
        vision_feature_select_strategy=layout.select_strategy,
        **fields,
    )


def make_processor(image_processor, tokenizer, layout):
    """`LlavaProcessor` whose placeholders are as many as the features of an encoder of this layout."""
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=layout.patch_size,
        vision_feature_select_strategy=layout.select_strategy,
        num_additional_image_tokens=layout.num_additional_tokens,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
    )


def plan_student(vision_tower, language_model, *, chat_template=None, trust_remote_code=False):
    """
    What [`build_student`] would make, from the configs, tokenizer and image processor of its parts alone.

    Args:
        vision_tower, language_model (`str`), chat_template (`str`, *optional*), trust_remote_code (`bool`, *optional*):
            As there.

    Returns:
        `tuple[LlavaModForConditionalGeneration, LlavaProcessor]`: the model on the meta device.

    Raises:
        ValueError: as there.
    """
    path, remote = resolve(vision_tower), {"trust_remote_code": trust_remote_code}
    tower_config = load_part("vision tower", vision_tower, AutoConfig.from_pretrained, path, **remote)
    image_processor, layout = load_vision_layout(tower_config, path, name=vision_tower, **remote)
    if image_processor is None:
        raise ValueError(f"The vision tower `{vision_tower}` has no image processor: save it beside the weights.")
    path = resolve(language_model)
    config = load_part("language model", language_model, AutoConfig.from_pretrained, path, **remote)
    tokenizer = load_part("tokenizer of", language_model, AutoTokenizer.from_pretrained, path, **remote)
    with torch.device("meta"):
        made = load_part("language model", language_model, AutoModelForCausalLM.from_config, config, **remote)
        _prepare_tokenizer(tokenizer, made, language_model, chat_template)
        config = student_config(
            vision_config_of(tower_config),
            made.config,
            layout,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        )
        model = LlavaModForConditionalGeneration(config)
    return model, make_processor(image_processor, tokenizer, layout)


def build_student(
    vision_tower,
    language_model,
    *,
    tokenizer=None,
    chat_template=None,
    vision_feature_layer=None,
    dtype="float32",
    trust_remote_code=False,
    seed=0,
):
    """
    A dense student: the given vision encoder and language model, and a new adaptor between them.

    Each weight is in memory once: it is read from its file in the wanted precision and then taken over, not copied.

    Args:
        vision_tower (`str`):
            Hub name, folder or `embedded:…` name of a CLIP, SigLIP (SigLIP 2 of fixed resolution too), DINOv2 or
            another encoder with a row of features per patch, or of a LLaVA whose encoder is taken.
        language_model (`str` or `PreTrainedModel`):
            Hub name, folder or `embedded:…` name of a causal language model, or the model itself, left unchanged.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Its tokenizer; by default loaded from where the language model is. The student's copy has `<image>`.
        chat_template (`str`, *optional*):
            Jinja template that writes `<image>` for an image; by default the tokenizer's.
        vision_feature_layer (`int` or `list[int]`, *optional*):
            Which hidden states of the encoder are read; by default a LLaVA's own, else see [`vision_layout`].
        dtype (`str`, *optional*, defaults to `"float32"`):
            Of all weights, such as `"bfloat16"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from those repositories may run.
        seed (`int`, *optional*, defaults to 0):
            Of the new weights: the adaptor's, and an added token's.

    Returns:
        `tuple[LlavaModForConditionalGeneration, LlavaProcessor]`.

    Raises:
        ValueError: if a part cannot be loaded, the encoder does not give one row of features per patch, the tokenizer
            has more tokens than the language model, or the chat template cannot render an image.
    """
    if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise ValueError(f"`dtype` is {dtype!r}: give a floating-point type of torch, such as float32 or bfloat16.")
    path, remote = resolve(vision_tower), {"trust_remote_code": trust_remote_code}
    tower_config = load_part("vision tower", vision_tower, AutoConfig.from_pretrained, path, **remote)
    image_processor, layout = load_vision_layout(
        tower_config, path, name=vision_tower, vision_feature_layer=vision_feature_layer, **remote
    )
    if image_processor is None:
        raise ValueError(f"The vision tower `{vision_tower}` has no image processor: save it beside the weights.")
    language_model, tokenizer, name = _load_language_model(language_model, tokenizer, dtype, trust_remote_code)
    if language_model.get_output_embeddings() is None:
        raise ValueError(f"`{name}` is a {type(language_model).__name__} without an output head: give a causal one.")
    tower = load_tower(tower_config, path, vision_tower, dtype)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _prepare_tokenizer(tokenizer, language_model, name, chat_template)
        for part in (tower, language_model):
            if Path(part.config.name_or_path).exists():
                part.config.name_or_path = ""  # it is saved with the student, and is a folder of this machine
        config = student_config(
            tower.config,
            language_model.config,
            layout,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        )
        model = _assemble(config, tower, language_model, dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = make_processor(image_processor, tokenizer, layout)
    prepare_generation(model, processor)
    return model, processor
