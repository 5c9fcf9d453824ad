"""The tiny random student, with its tokenizer and processor, that most tests run on."""

import torch
from transformers import CONFIG_MAPPING, LlavaProcessor, SiglipVisionConfig

from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration
from llava_mod_hf.commands.pretrain import image_processor

IMAGE_SIZE, PATCH_SIZE = 64, 16


def make_processor(tokenizer, *, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, chat_template=None):
    return LlavaProcessor(
        image_processor=image_processor(image_size),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=chat_template or tokenizer.chat_template,
        image_token="<image>",
    )


def make_student(tokenizer, moe_layers=(0, 2), text_model_type="llama", seed=0):
    vision_config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    text_config = CONFIG_MAPPING[text_model_type](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config = LlavaModConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        moe_layers=list(moe_layers),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlavaModForConditionalGeneration(config).eval()
