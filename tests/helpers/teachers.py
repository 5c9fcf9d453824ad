"""Teachers whose processor is another than the student's."""

import copy

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from helpers.ddp_gradients import sharpened
from helpers.tiny import make_processor

ANSWER = "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][-1]['text'] }}{% endif %}"

IMAGE = "{% if m['content'] is not string and m['content'][0]['type'] == 'image' %}<image>{% endif %}"

TEMPLATE = (
    "look: {% for m in messages %}{% if m['role'] == 'user' %}{{ 'user: ' }}" + IMAGE + ANSWER +
    "{% else %}{{ ' answer:' }}{% generation %}BEFORE" + ANSWER + "END{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' answer:' }}{% endif %}"
)  # fmt: skip


def template(before="", end="<|user|>"):
    """A chat template unlike the embedded one: other roles, `before` each answer and `end` after it."""
    return TEMPLATE.replace("BEFORE", before).replace("END", end)


@pytest.fixture(scope="module")
def make_teacher(tokenizer):
    """`make_teacher(**options)`: a stock LLaVA of other width, depth and image size, and its processor."""

    def make(image_size=96, patch_size=32, width=48, layers=2, vocab_size=None, seed=1, **options):
        vision_config = SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch_size,
            vision_use_head=False,
        )
        text_config = LlamaConfig(
            vocab_size=vocab_size or len(tokenizer),
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
        config = LlavaConfig(
            vision_config=vision_config,
            text_config=text_config,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=(image_size // patch_size) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlavaForConditionalGeneration(config).eval()
        processor = make_processor(
            copy.deepcopy(tokenizer),
            image_size=image_size,
            patch_size=patch_size,
            chat_template=template(**options),
        )
        return sharpened(model), processor

    return make
