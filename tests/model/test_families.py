"""Language-model families and vision encoders: what each one's own model computes, the student computes as well."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from helpers.models import (
    FAMILIES,
    IMAGE_TOKEN,
    SIZES,
    SMALL,
    TOLD_APART,
    VISION,
    assert_same_logits,
    image_inputs,
    make_dense,
)
from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration, upcycle
from llava_mod_hf.model.modeling_llava_mod import family_head, logit_transform
from llava_mod_hf.model.moe_llava_mod import LlavaModSparseMoeBlock

# What somebody without the package does with all of them: load by the code in each folder, and run.
ELSEWHERE = """
import sys
sys.modules["llava_mod_hf"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
inputs, *folders = sys.argv[1:]
inputs = load_file(inputs)
for folder in folders:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    with torch.no_grad():
        save_file({"logits": model(**inputs).logits.contiguous()}, folder + "/elsewhere.safetensors")
"""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in TOLD_APART else pytest.mark.slow) for name in FAMILIES],
)
def model_type(request):
    return request.param


@pytest.fixture(scope="module")
def dense(model_type):
    return make_dense(model_type)


@pytest.fixture(scope="module")
def sparse(dense):
    return upcycle(dense, layers="all")


@torch.no_grad()
def test_text_logits_are_the_familys_own(dense, model_type):
    family = AutoModelForCausalLM.from_config(dense.config.text_config).eval()
    family.base_model.load_state_dict(dense.model.language_model.state_dict())
    family.get_output_embeddings().load_state_dict(dense.lm_head.state_dict())
    assert family.config.model_type == model_type
    input_ids = image_inputs(rows=2)["input_ids"] % 80
    assert_same_logits(dense(input_ids).logits, family(input_ids).logits)


@torch.no_grad()
def test_what_the_family_does_after_the_last_layer_matters(dense, model_type):
    hidden = dense.model(**image_inputs()).last_hidden_state
    plain = hidden @ dense.lm_head.weight.T
    scale, cap = logit_transform(dense.config.text_config)
    changed = model_type in ("gemma2", "phi", "cohere", "granite")
    assert changed == (scale != 1 or cap is not None or dense.lm_head.bias is not None)
    assert ((dense(**image_inputs()).logits - plain).abs().max() > 0.1) == changed


@torch.no_grad()
def test_trls_fused_head_trains_on_the_same_logits(dense):
    student, inputs = copy.deepcopy(dense), image_inputs(rows=2)
    inputs["labels"] = inputs["input_ids"]
    expected = dense(**inputs).loss
    add_fused_lm_head(student)  # replaces `forward`, and projects by the head and the text config's fields
    assert student(**inputs, fused_lm_head=True).loss.item() == pytest.approx(expected.item(), abs=1e-4)


@torch.no_grad()
def test_upcycled_equals_dense(dense, sparse):
    inputs = image_inputs(rows=2)
    assert len([module for module in sparse.modules() if isinstance(module, LlavaModSparseMoeBlock)]) == 2
    assert_same_logits(sparse(**inputs).logits, dense(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "values", [{"expert_rank": 3}, {"use_residual": True}, {"expert_rank": 1, "use_residual": True}]
)
def test_lighter_and_residual_experts_equal_dense(dense, values):
    inputs = image_inputs()
    assert_same_logits(upcycle(dense, **values)(**inputs).logits, dense(**inputs).logits)


def test_one_step_changes_routers_and_experts(sparse):
    student = copy.deepcopy(sparse).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    inputs = image_inputs(rows=4)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    student(**inputs, labels=inputs["input_ids"], output_router_logits=True).loss.backward()
    optimizer.step()
    for name, value in student.state_dict().items():
        if ".mlp." in name:
            assert (value - before[name]).abs().max() > 1e-5, name


@torch.no_grad()
def test_generating_with_the_cache_equals_generating_without(sparse):
    inputs = image_inputs(rows=2)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, :2] = 0
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE_TOKEN]}
    with_cache = sparse.generate(**inputs, **greedy, use_cache=True)
    assert with_cache.shape[1] == inputs["input_ids"].shape[1] + 5
    assert torch.equal(with_cache, sparse.generate(**inputs, **greedy, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_alone_equals_itself_in_a_padded_batch_of_four(sparse, side):
    inputs = image_inputs(rows=4)
    padding, mask = torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 11, dtype=torch.long)
    parts = {"left": (padding, inputs["input_ids"]), "right": (inputs["input_ids"], padding)}[side]
    masks = {"left": (padding, mask), "right": (mask, padding)}[side]
    attention_mask = torch.cat(masks, dim=1)
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    batch = {"input_ids": torch.cat(parts, dim=1), "attention_mask": attention_mask, "position_ids": position_ids}
    logits = sparse(**batch, pixel_values=inputs["pixel_values"]).logits
    for row in range(4):
        alone = sparse(inputs["input_ids"][row : row + 1], pixel_values=inputs["pixel_values"][row : row + 1]).logits
        assert_same_logits(logits[row][attention_mask[row].bool()], alone[0])


# Saved, and loaded where the package is not


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every family's sparse student in a folder of its own, loaded and run by one process without the package."""
    root = tmp_path_factory.mktemp("families")
    inputs = image_inputs(rows=2)
    save_file(inputs, root / "inputs.safetensors")
    expected = {}
    for model_type in FAMILIES:
        # trained a little, so that an expert taken for another would show
        student = upcycle(make_dense(model_type), layers=[1])
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if ".experts." in name:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
            expected[model_type] = student(**inputs).logits
        student.save_pretrained(root / model_type)
    process = subprocess.run(
        [sys.executable, "-P", "-c", ELSEWHERE, root / "inputs.safetensors", *(root / name for name in FAMILIES)],
        env={**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return root, expected


def test_the_same_logits_without_the_package(folders):
    root, expected = folders
    assert expected.keys() == FAMILIES.keys()
    for model_type, logits in expected.items():
        assert_same_logits(load_file(root / model_type / "elsewhere.safetensors")["logits"], logits)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_expert_has_its_own_tensors_in_the_file_named_as_the_familys(folders, model_type):
    stored = load_file(folders[0] / model_type / "model.safetensors")
    prefix = "model.language_model.layers."
    dense_names = [name.removeprefix(f"{prefix}0.mlp.") for name in stored if name.startswith(f"{prefix}0.mlp.")]
    experts = {name: value for name, value in stored.items() if ".experts." in name}
    assert set(experts) == {f"{prefix}1.mlp.experts.{expert}.{name}" for expert in range(4) for name in dense_names}
    for name in dense_names:
        assert experts[f"{prefix}1.mlp.experts.3.{name}"].shape == stored[f"{prefix}0.mlp.{name}"].shape
    config = json.loads((folders[0] / model_type / "config.json").read_text())
    assert config["text_config"]["model_type"] == model_type


# What cannot be


@pytest.mark.parametrize(
    ("model_type", "values", "message"),
    [
        ("gpt_neox", {}, r"`language_model\.layers\.1\.mlp` is a GPTNeoXMLP, made of dense_h_to_4h, dense_4h_to_h"),
        ("starcoder2", {}, r"`language_model\.layers\.1\.mlp` is a Starcoder2MLP, made of c_fc, c_proj, act"),
        ("qwen3_moe", {"head_dim": 8}, r"`language_model\.layers\.1\.mlp` is a Qwen3MoeSparseMoeBlock"),
        ("gpt2", {}, r"GPT2Model has no `layers\[i\]\.mlp`"),
    ],
)
def test_an_ffn_that_experts_cannot_reproduce_is_refused(model_type, values, message):
    text_config = CONFIG_MAPPING[model_type](**{**SMALL, **values})
    with pytest.raises(ValueError, match=message):
        LlavaModForConditionalGeneration(LlavaModConfig(vision_config=VISION, text_config=text_config, moe_layers=[1]))


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("bert", "BertLMHeadModel changes its logits after `lm_head` in a way that is not known"),
        ("vit", "transformers has no causal language model for `vit`"),
        ("mamba", "The head of MambaForCausalLM could not be read"),
    ],
)
def test_a_head_that_is_not_known_is_refused(model_type, message):
    with pytest.raises(ValueError, match=message):
        family_head(CONFIG_MAPPING[model_type](hidden_size=32))


def test_a_head_is_read_without_a_warning_of_tokens(monkeypatch):
    """Those of a large vocabulary, which the few of the family's model that is asked do not have."""
    warned = []
    monkeypatch.setattr("transformers.configuration_utils.logger.warning", lambda text, *args: warned.append(text))
    monkeypatch.setattr("transformers.configuration_utils.logger.warning_once", lambda text, *args: warned.append(text))
    tokens = {"bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643}
    head = family_head(CONFIG_MAPPING["qwen2"](hidden_size=32, num_attention_heads=2, vocab_size=151936, **tokens))
    assert head.weight.shape == (151936, 32)
    assert [text for text in warned if "token_id" in text] == []


def test_an_ffn_that_does_more_than_its_parts_is_refused():
    dense = make_dense("llama")
    mlp = dense.model.language_model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden_states: 1.01 * forward(hidden_states)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp` is a LlamaMLP that does more than its linear layers"):
        upcycle(dense)
    assert upcycle(dense, layers=[1]).config.moe_layers == [1]


# Vision encoders

TOWERS = {
    "clip_vision_model": ({**SIZES, "image_size": 32, "patch_size": 16}, -2, "default"),
    "siglip_vision_model": ({**SIZES, "image_size": 32, "patch_size": 16, "vision_use_head": False}, -1, "full"),
    "dinov2": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 16},
        -1,
        "default",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("tower_type", TOWERS)
def test_image_features_are_of_the_patches(tower_type):
    values, layer, strategy = TOWERS[tower_type]
    config = LlavaModConfig(
        vision_config={"model_type": tower_type, **values},
        text_config={"model_type": "llama", **SMALL},
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        image_token_index=IMAGE_TOKEN,
    )
    model = LlavaModForConditionalGeneration(config).eval()
    inputs = image_inputs(rows=2)
    features = torch.stack(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[layer]
    assert hidden.shape[1] == 4 + (strategy == "default")
    expected = model.model.multi_modal_projector(hidden[:, 1:] if strategy == "default" else hidden)
    assert features.shape == (2, 4, 32)
    torch.testing.assert_close(features, expected)
    logits = model(**inputs).logits
    assert not torch.allclose(model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits, logits)


def test_a_tower_that_needs_more_than_pixels_is_refused():
    config = LlavaModConfig(
        vision_config={"model_type": "siglip2_vision_model", **SIZES}, text_config={"model_type": "llama", **SMALL}
    )
    with pytest.raises(ValueError, match="Siglip2VisionModel needs pixel_values, pixel_attention_mask, spatial_shapes"):
        LlavaModForConditionalGeneration(config)
