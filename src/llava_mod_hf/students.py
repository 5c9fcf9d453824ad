"""A student from a pretrained vision encoder and a pretrained language model, as in the paper."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaProcessor,
)

from llava_mod_hf.configuration_llava_mod import LlavaModConfig
from llava_mod_hf.embedded import resolve
from llava_mod_hf.modeling_llava_mod import LlavaModForConditionalGeneration

IMAGE_TOKEN = "<image>"


def _load_vision_tower(name, trust_remote_code):
    """
    Vision encoder, image processor, feature layer and selection of a CLIP- or SigLIP-like model, or of a LLaVA.
    """
    path = resolve(name)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    kwargs = {"dtype": "float32", "trust_remote_code": trust_remote_code}
    if hasattr(config, "vision_feature_layer"):  # a LLaVA: its encoder is shared, as in the paper
        tower = AutoModelForImageTextToText.from_pretrained(path, **kwargs).model.vision_tower
        image_processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code).image_processor
        return tower, image_processor, config.vision_feature_layer, config.vision_feature_select_strategy
    model = AutoModel.from_pretrained(path, **kwargs)
    tower = getattr(model, "vision_model", model)
    image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    # LLaVA reads CLIP's layer −2 without its CLS token; SigLIP has none, and its last layer is read whole.
    has_cls = hasattr(tower, "embeddings") and hasattr(tower.embeddings, "class_embedding")
    return tower, image_processor, *((-2, "default") if has_cls else (-1, "full"))


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


def build_student(vision_tower, language_model, *, tokenizer=None, chat_template=None, trust_remote_code=False, seed=0):
    """
    A dense student: the given vision encoder and language model, and a new adaptor between them.

    Args:
        vision_tower (`str`):
            Hub name, folder or `embedded:…` name of a CLIP- or SigLIP-like model, or of a LLaVA whose encoder is taken.
        language_model (`str` or `PreTrainedModel`):
            Hub name, folder or `embedded:…` name of a causal language model, or the model itself.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Its tokenizer; by default loaded from where the language model is. An `<image>` token is added if missing.
        chat_template (`str`, *optional*):
            Jinja template that writes `<image>` for an image; by default the tokenizer's.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from those repositories may run.
        seed (`int`, *optional*, defaults to 0):
            Of the adaptor's weights.

    Returns:
        `tuple[LlavaModForConditionalGeneration, LlavaProcessor]`.

    Raises:
        ValueError: if the chat template cannot render an image.
    """
    tower, image_processor, feature_layer, select_strategy = _load_vision_tower(vision_tower, trust_remote_code)
    name = language_model if isinstance(language_model, str) else type(language_model).__name__
    if isinstance(language_model, str):
        path = resolve(language_model)
        language_model = AutoModelForCausalLM.from_pretrained(
            path, dtype="float32", trust_remote_code=trust_remote_code
        )
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)

    tokenizer.chat_template = chat_template or tokenizer.chat_template
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    _check_chat_template(tokenizer, name)
    if len(tokenizer) > language_model.config.vocab_size:
        language_model.resize_token_embeddings(len(tokenizer))

    for part in (tower, language_model):
        if Path(part.config.name_or_path).exists():
            part.config.name_or_path = ""  # it is saved with the student, and is a folder of this machine
    patch_size, image_size = tower.config.patch_size, tower.config.image_size
    config = LlavaModConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=select_strategy,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaModForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language_model.base_model.state_dict())
    model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=select_strategy,
        num_additional_image_tokens=int(select_strategy == "default"),
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
    )
    return model, processor
