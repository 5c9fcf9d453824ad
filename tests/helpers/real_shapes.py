"""
The published models that recipes name, random and with few layers, and otherwise of their real sizes: widths, heads,
FFNs, vocabulary and ids of special tokens, image size, patches, tiles.

The sizes are those of [`helpers.published_models`]; the numbers of tokens are those of the published tokenizers, whose
words are not here: a small tokenizer is filled up to their number, so that each special token has its own id.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
)

from helpers.published_models import (
    CLIP,
    ONEVISION,
    QWEN2_TOKENS,
    QWEN3_VL,
    SIGLIP2,
    TEACHER_TEMPLATE,
    TOKENS,
    published_config,
)
from helpers.published_models import tokenizer as small_tokenizer

WORDS = 151643  # of Qwen2's and Qwen3's tokenizer.json, before the special tokens

LAYERS = {"student": 2, "teacher": 1, "vision": 2}  # LLaVA reads an encoder's last layer but one


def tokenizer(name):
    """A tokenizer with as many tokens as the published one, and its special tokens under their ids."""
    model = json.loads(small_tokenizer(name).backend_tokenizer.to_str())["model"]
    special = TOKENS.get(name, QWEN2_TOKENS)
    vocab = {word: number for word, number in model["vocab"].items() if word not in special}
    assert sorted(vocab.values()) == list(range(len(vocab)))
    vocab |= {f"unused {number}": number for number in range(len(vocab), WORDS)}
    words = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def shallow(config, text_layers):
    """The same config with fewer layers, of its language model and of its vision encoder."""
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    if vision is not None:
        setattr(vision, "depth" if hasattr(vision, "depth") else "num_hidden_layers", LAYERS["vision"])
    if config.model_type == "qwen3_vl":  # one place for each layer that features are added behind
        vision.deepstack_visual_indexes = [0]
    text.num_hidden_layers = text_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:text_layers]
    return config


def save_shallow(name, root):
    """
    Saves a random model of a published one's sizes with few layers, and its tokenizer or processor, under `root/name`.

    Returns:
        `Path`: the folder. Teachers are stored in bfloat16, as the published ones are.
    """
    folder, config, words = Path(root) / name, published_config(name), tokenizer(name)
    is_teacher = name in (ONEVISION, QWEN3_VL)
    shallow(config, LAYERS["teacher" if is_teacher else "student"])
    torch.set_default_dtype(torch.bfloat16 if is_teacher else torch.float32)
    try:
        if name in (CLIP, SIGLIP2):
            model, processor = AutoModel.from_config(config), _image_processor(name, config.vision_config.image_size)
        elif is_teacher:
            processor = _processor(name, config, words)
            model = AutoModelForImageTextToText.from_config(config)
        else:
            model, processor = AutoModelForCausalLM.from_config(config), words
            # as published: what `generate` does with it is none of the student's business
            model.generation_config = GenerationConfig(
                eos_token_id=[WORDS + 2, WORDS], pad_token_id=WORDS, do_sample=True, temperature=0.7, top_k=20
            )
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _image_processor(name, size):
    square = {"height": size, "width": size}
    if name == CLIP:
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
    return SiglipImageProcessorPil(size=square)


def _processor(name, config, words):
    """A teacher's processor, with the sizes of images and tiles of its `preprocessor_config.json`."""
    if name == ONEVISION:
        config.image_token_index = config.image_token_id = words.convert_tokens_to_ids("<image>")
        config.video_token_index = config.video_token_id = words.convert_tokens_to_ids("<video>")
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessorPil(image_grid_pinpoints=config.image_grid_pinpoints),
            words,
            num_image_tokens=729,
            vision_feature_select_strategy="full",
            chat_template=TEACHER_TEMPLATE.replace("IMAGE", "<image>\n"),
        )
    for part in ("image", "video"):
        setattr(config, f"{part}_token_id", words.convert_tokens_to_ids(f"<|{part}_pad|>"))
    config.vision_start_token_id = words.convert_tokens_to_ids("<|vision_start|>")
    config.vision_end_token_id = words.convert_tokens_to_ids("<|vision_end|>")
    return Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(
            patch_size=16,
            size={"shortest_edge": 65536, "longest_edge": 16777216},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        words,
        chat_template=TEACHER_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
