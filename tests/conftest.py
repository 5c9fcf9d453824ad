"""Fixtures of several test files: the tokenizer and processor of the embedded models, and tiny random students."""

import time

import pytest
import torch
from huggingface_hub import constants
from transformers import CONFIG_MAPPING, LlavaProcessor, SiglipVisionConfig

from helpers.hub_server import HubServer
from helpers.teachers import make_teacher  # noqa: F401 (a fixture)
from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration
from llava_mod_hf.commands.pretrain import image_processor, train_tokenizer

IMAGE_SIZE, PATCH_SIZE = 64, 16


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(384)


@pytest.fixture(scope="session")
def processor(tokenizer):
    return LlavaProcessor(
        image_processor=image_processor(IMAGE_SIZE),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=tokenizer.chat_template,
        image_token="<image>",
    )


@pytest.fixture(scope="session")
def make_student(tokenizer):
    """`make_student(moe_layers=[0, 2], text_model_type="llama", seed=0)`: a new random student in evaluation mode."""

    def make(moe_layers=(0, 2), text_model_type="llama", seed=0):
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

    return make


@pytest.fixture
def hub(monkeypatch):
    """A server that the client of this process talks to, with a token that may write."""
    with HubServer() as server:
        # read from the environment at the client's import, which was long ago
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client backs off for 23 seconds
        yield server
