"""Fixtures of conversion: an encoder, a tokenizer, and tiny checkpoints of the authors' layout."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from helpers.authors_layout import (
    KINDS,
    TOWER,
    config_values,
    random_state,
    text_shapes,
    vision_shapes,
    write_checkpoint,
)
from helpers.build_cases import (
    ENCODERS,
    LANGUAGE_MODEL,
    save,
)
from llava_mod_hf.loading import resolve


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**TOWER)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain_tokenizer():
    tokens = ["<pad>", "<|endoftext|>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|endoftext|>", additional_special_tokens=["</s>"]
    )


@pytest.fixture
def make_checkpoint(tmp_path, tower_folder, plain_tokenizer):
    """`make_checkpoint("phi", moe=…)`: folder, config and weights of a tiny checkpoint of that layout."""

    def make(kind, *, moe=None, lineage="moe", own_tower=True, shards=2, safetensors=False, **extra):
        sizes = {"vocab_size": 300, **KINDS[kind], **extra}
        values = config_values(kind, sizes, moe=moe, tower=tower_folder)
        shapes = text_shapes(kind, values) | vision_shapes(TOWER, values["hidden_size"], lineage=lineage)
        if not own_tower:
            shapes = {name: shape for name, shape in shapes.items() if "_tower." not in name}
        state = random_state(shapes)
        folder = write_checkpoint(
            tmp_path / "checkpoint", values, state, plain_tokenizer, shards=shards, safetensors=safetensors
        )
        return folder, values, state

    return make


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """`{name: (model, folder)}`."""
    folder, made = tmp_path_factory.mktemp("encoders"), {}
    with torch.random.fork_rng():
        for name, (make, image_processor, _) in ENCODERS.items():
            model = make().eval()
            made[name] = model, save(folder / name, model, image_processor)
    return made


@pytest.fixture(scope="module")
def language_model():
    return AutoModelForCausalLM.from_pretrained(resolve(LANGUAGE_MODEL)).eval()


@pytest.fixture(scope="module")
def lm_tokenizer():
    return AutoTokenizer.from_pretrained(resolve(LANGUAGE_MODEL))
