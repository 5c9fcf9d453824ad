"""Small models and batches that several test files build."""

import torch
from transformers import CONFIG_MAPPING, LlavaConfig, LlavaForConditionalGeneration

from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration
from llava_mod_hf.data.easy_vqa import image_paths
from llava_mod_hf.model.moe_llava_mod import LlavaModSparseMoeBlock

QUESTIONS = ["is there a red circle?", "what color is it?", "what shape is the blue shape?", "?"]


def sharpen(model):
    """Larger weights: a freshly initialised model gives every row the same answer, which no mistake would change."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def prompt_inputs(processor, row):
    """One row's prompt, written out by hand and unpadded."""
    image = "<image>" if row["images"] else ""
    text = f"<|user|>{image}{row['question']}<|assistant|>"
    return dict(processor(text=text, images=row["images"] or None, return_tensors="pt"))


def extend(inputs, token_ids):
    new = torch.tensor([token_ids], dtype=torch.long)
    return inputs | {
        "input_ids": torch.cat([inputs["input_ids"], new], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1),
    }


def image_batch(processor, questions):
    """Left-padded prompts, each with an image of its own."""
    texts = [f"<|user|><image>{question}<|assistant|>" for question in questions]
    images = [path for _, path in zip(questions, image_paths("test").values(), strict=False)]
    return dict(processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt"))


def stock_twin(dense):
    """The `LlavaForConditionalGeneration` of transformers with a dense student's weights."""
    values = {name: value for name, value in dense.config.to_dict().items() if name not in ("model_type", "auto_map")}
    model = LlavaForConditionalGeneration(LlavaConfig(**values)).eval()
    model.load_state_dict(dense.state_dict())
    return model


def assert_same_logits(logits, expected):
    """At most 1e-5 of the largest logit apart, or of 1."""
    largest = expected.abs().max().item()
    assert largest > 0.5  # logits next to 0 would hide any difference
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * max(1.0, largest))


def moe_blocks(model):
    return [module for module in model.modules() if isinstance(module, LlavaModSparseMoeBlock)]


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

SMALL = {**SIZES, "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

VISION = {"model_type": "siglip_vision_model", **SIZES, "image_size": 32, "patch_size": 16, "vision_use_head": False}

IMAGE_TOKEN = 90

FAMILIES = {
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "smollm3": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 4},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "phi3": {"num_key_value_heads": 2},
    "phi": {},
    "stablelm": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 3.0},
}


def make_dense(model_type, seed=0, **values):
    """A dense student of a family, with weights that matter: norms, biases and all."""
    text_config = CONFIG_MAPPING[model_type](**{**SMALL, **FAMILIES.get(model_type, {}), **values})
    config = LlavaModConfig(
        vision_config=VISION,
        text_config=text_config,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaModForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def image_inputs(rows=1, seed=0):
    """Prompts of one image and some text each."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 80, (rows, 7), generator=generator)
    input_ids = torch.cat([text[:, :2], torch.full((rows, 4), IMAGE_TOKEN), text[:, 2:]], dim=1)
    return {"input_ids": input_ids, "pixel_values": torch.randn(rows, 3, 32, 32, generator=generator)}


# Those that differ from all the others in FFN, head, attention layout or norms; `make test-all` runs every one.
TOLD_APART = ("qwen2", "gemma2", "phi3", "phi", "stablelm", "cohere")
