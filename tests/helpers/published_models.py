"""
The published models that recipes name: their configs as on the Hub, and small random ones of the same classes.

The sizes were written down from the models' `config.json`; `PUBLISHED` has what decides the number of parameters.
"""

import copy
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    SiglipConfig,
    SiglipImageProcessorPil,
)

CLIP = "openai/clip-vit-large-patch14-336"
SIGLIP2 = "google/siglip2-so400m-patch16-384"
ONEVISION = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
QWEN3_VL = "Qwen/Qwen3-VL-8B-Instruct"


def _qwen2(hidden_size, intermediate_size, layers, heads, key_value_heads, **values):
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        **values,
    }


_CLIP_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}

PUBLISHED = {
    "Qwen/Qwen2-0.5B-Instruct": (Qwen2Config, _qwen2(896, 4864, 24, 14, 2)),
    "Qwen/Qwen2-1.5B-Instruct": (Qwen2Config, _qwen2(1536, 8960, 28, 12, 2)),
    "Qwen/Qwen3-0.6B": (Qwen3Config, _qwen2(1024, 3072, 28, 16, 8, head_dim=128)),
    CLIP: (CLIPConfig, {"vision_config": _CLIP_VISION}),
    SIGLIP2: (SiglipConfig, {"vision_config": {**_SO400M, "image_size": 384, "patch_size": 16}}),
    ONEVISION: (
        LlavaOnevisionConfig,
        {
            # the tower without its last layer and without its head, the vocabulary padded to a multiple of 64
            "vision_config": {
                "model_type": "siglip_vision_model",
                **_SO400M,
                "num_hidden_layers": 26,
                "image_size": 384,
                "patch_size": 14,
                "vision_use_head": False,
            },
            "text_config": {
                "model_type": "qwen2",
                **_qwen2(3584, 18944, 28, 28, 4, vocab_size=152128, tie_word_embeddings=False),
            },
            "tie_word_embeddings": False,
        },
    ),
    QWEN3_VL: (
        Qwen3VLConfig,
        {
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "depth": 27,
                "num_heads": 16,
                "patch_size": 16,
                "out_hidden_size": 4096,
                "deepstack_visual_indexes": [8, 16, 24],
                "num_position_embeddings": 2304,
            },
            "text_config": {
                **_qwen2(4096, 12288, 36, 32, 8, head_dim=128, tie_word_embeddings=False),
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 5e6,
                    "mrope_interleaved": True,
                    "mrope_section": [24, 20, 20],
                },
            },
            "tie_word_embeddings": False,
        },
    ),
}

# In the order of their ids, behind the words
QWEN2_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN3_TOKENS = [
    *QWEN2_TOKENS,
    *(f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad", "vision") for end in ("start", "end")),
    *(f"<|{name}_pad|>" for name in ("vision", "image", "video")),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]
TOKENS = {ONEVISION: [*QWEN2_TOKENS, "<image>", "<video>"], QWEN3_VL: QWEN3_TOKENS, "Qwen/Qwen3-0.6B": QWEN3_TOKENS}
TEXT = "what is in the picture? a red circle and a blue square. is there a dog? no, there is none. describe it shortly."
# What the teachers' own templates write for questions and answers without tools or a system message
TEACHER_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def published_config(name):
    """The config of a model of the Hub, without its weights."""
    config_class, values = PUBLISHED[name]
    return config_class(**copy.deepcopy(values))


def tokenizer(name):
    """A small tokenizer with the published one's special tokens, of which a text model's has none for an image."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator([TEXT], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    words.add_special_tokens(TOKENS.get(name, QWEN2_TOKENS))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def _small(config, words):
    """The same config with few and narrow layers; nothing else is changed."""
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    if vision is not None:
        for key, value in narrow.items():
            setattr(vision, key, value)
        if config.model_type == "qwen3_vl":
            vision.update({"depth": 2, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16})
            vision.deepstack_visual_indexes = [0, 1]
        else:
            vision.image_size = 2 * vision.patch_size
    if text is not config or vision is None:
        text.update({**narrow, "num_key_value_heads": 1, "head_dim": 16})
        # padded differently in each model, as the published ones are
        text.vocab_size = len(words) + (32 if vision is None else 48)
        text.layer_types = ["full_attention"] * 3
        if config.model_type == "qwen3_vl":
            text.rope_parameters["mrope_section"] = [4, 2, 2]
    return config


def save_small(name, root):
    """
    Saves a random model of a published one's classes, small, with its tokenizer or processor, under `root/name`.

    Returns:
        `Path`: the folder.
    """
    folder, words, config = Path(root) / name, tokenizer(name), published_config(name)
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        if name in (CLIP, SIGLIP2):
            for part in (config.text_config, config.vision_config):
                part.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2})
                part.num_attention_heads = 2
            size = config.vision_config.image_size = 2 * config.vision_config.patch_size
            AutoModel.from_config(config).save_pretrained(folder)
            square = {"height": size, "width": size}
            processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
            if name == SIGLIP2:
                processor = SiglipImageProcessorPil(size=square)
            processor.save_pretrained(folder)
        elif name in (ONEVISION, QWEN3_VL):
            _save_teacher(name, _small(config, words), words, folder)
        else:
            AutoModelForCausalLM.from_config(_small(config, words)).save_pretrained(folder)
            words.save_pretrained(folder)
    return folder


def _save_teacher(name, config, words, folder):
    if name == ONEVISION:
        size = config.vision_config.image_size
        config.image_grid_pinpoints = [[size, size], [size, 2 * size], [2 * size, size]]
        config.image_token_index = config.image_token_id = words.convert_tokens_to_ids("<image>")
        config.video_token_index = config.video_token_id = words.convert_tokens_to_ids("<video>")
        processor = LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessorPil(
                size={"height": size, "width": size}, image_grid_pinpoints=config.image_grid_pinpoints
            ),
            words,
            num_image_tokens=4,
            vision_feature_select_strategy="full",
            chat_template=TEACHER_TEMPLATE.replace("IMAGE", "<image>\n"),
        )
    else:
        for part in ("image", "video"):
            setattr(config, f"{part}_token_id", words.convert_tokens_to_ids(f"<|{part}_pad|>"))
        config.vision_start_token_id = words.convert_tokens_to_ids("<|vision_start|>")
        config.vision_end_token_id = words.convert_tokens_to_ids("<|vision_end|>")
        processor = Qwen3VLProcessor(
            Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}),
            words,
            chat_template=TEACHER_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
        )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def without_video(monkeypatch):
    """Only the video half of these processors needs torchvision, which is not installed here."""
    for processor_class in (LlavaOnevisionProcessor, Qwen3VLProcessor):
        monkeypatch.setattr(
            processor_class, "get_attributes", classmethod(lambda cls: ["image_processor", "tokenizer"])
        )
