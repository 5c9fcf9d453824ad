"""The student's model, against the families of transformers and against sums written out here."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2Model,
)

from helpers.models import QUESTIONS, assert_same_logits, moe_blocks, sharpen, stock_twin
from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration, LlavaModModel
from llava_mod_hf.data.easy_vqa import image_paths
from llava_mod_hf.loading import load_whole
from llava_mod_hf.model.moe_llava_mod import LlavaModExperts

EXPERTS_IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]


TINY_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


TINY_TEXT = {**TINY_SIZES, "vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1}


TINY_VISION = {"model_type": "siglip_vision_model", **TINY_SIZES, "image_size": 64, "vision_use_head": False}


@pytest.fixture(scope="module")
def dense(make_student, text_model_type):
    return sharpen(make_student(moe_layers=[], text_model_type=text_model_type))


def sparse_config(text_config):
    return LlavaModConfig(vision_config=TINY_VISION, text_config=text_config, moe_layers=[1])


def moe_by_hand(block, hidden_states, top_k):
    """Token by token and expert by expert, in float64."""
    gate_weight = block.gate.weight.double()
    gate_up_proj, down_proj = block.experts.gate_up_proj.double(), block.experts.down_proj.double()
    size = gate_up_proj.shape[1] // 2
    outputs = []
    for token in hidden_states.double().reshape(-1, hidden_states.shape[-1]):
        scores = (gate_weight @ token).exp()
        probabilities = (scores / scores.sum()).tolist()
        chosen = sorted(range(len(probabilities)), key=lambda expert: -probabilities[expert])[:top_k]
        total = sum(probabilities[expert] for expert in chosen)
        output = torch.zeros_like(token)
        for expert in chosen:
            gate, up = gate_up_proj[expert][:size] @ token, gate_up_proj[expert][size:] @ token
            activated = gate / (1 + (-gate).exp()) * up
            output += probabilities[expert] / total * (down_proj[expert] @ activated)
        outputs.append(output)
    return torch.stack(outputs).view_as(hidden_states)


@torch.no_grad()
def test_a_dense_students_text_logits_are_its_familys(dense, text_model_type):
    family = AutoModelForCausalLM.from_config(dense.config.text_config).eval()
    family.model.load_state_dict(dense.model.language_model.state_dict())
    family.lm_head.load_state_dict(dense.lm_head.state_dict())
    assert family.config.model_type == text_model_type
    input_ids = torch.arange(20, 60).view(2, 20)
    assert_same_logits(dense(input_ids).logits, family(input_ids).logits)


@torch.no_grad()
def test_a_dense_students_logits_are_stock_llavas(dense, batch):
    stock = stock_twin(dense)
    logits, expected = dense(**batch).logits, stock(**batch).logits
    assert_same_logits(logits, expected)
    other_images = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    assert (dense(**other_images).logits - logits).abs().max() > 1e-2  # the images do matter


def test_a_dense_student_has_no_router_logits(dense, batch):
    outputs = dense(**batch, labels=batch["input_ids"], output_router_logits=True)
    assert outputs.router_logits is None
    assert outputs.aux_loss is None
    assert outputs.loss.isfinite()


@pytest.mark.parametrize("experts_implementation", EXPERTS_IMPLEMENTATIONS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
@torch.no_grad()
def test_block_equals_an_explicit_loop(make_student, experts_implementation, top_k):
    student = make_student()
    student.set_experts_implementation(experts_implementation)
    assert {block.experts.config._experts_implementation for block in moe_blocks(student)} == {experts_implementation}
    hidden_states = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    for block in moe_blocks(student):
        # with the default standard deviation of 0.02 the gates are all but equal, and the output all but 0
        for parameter in block.parameters():
            parameter.mul_(20)
        block.gate.top_k = top_k
        output = block(hidden_states)
        expected = moe_by_hand(block, hidden_states, top_k)
        assert_same_logits(output.double(), expected)


@torch.no_grad()
def test_experts_implementations_agree_in_the_whole_model(make_student, batch):
    student = sharpen(make_student())
    logits = []
    for name in EXPERTS_IMPLEMENTATIONS:
        student.set_experts_implementation(name)
        logits.append(student(**batch).logits)
    assert_same_logits(logits[1], logits[0])
    assert_same_logits(logits[2], logits[0])


def test_experts_implementation_can_be_chosen_whatever_was_built_before(make_student, tmp_path):
    # transformers keeps by class whether it can be chosen, and a subclass finds what its parent kept
    LlamaModel(make_student(moe_layers=[]).config.text_config)
    LlavaForConditionalGeneration(
        LlavaConfig(text_config={"model_type": "llama", **TINY_TEXT}, vision_config=TINY_VISION)
    )
    student = make_student()
    student.save_pretrained(tmp_path)
    for model_class in (LlavaModForConditionalGeneration, LlavaModModel):
        loaded = model_class.from_pretrained(tmp_path)
        assert loaded.config.text_config._experts_implementation == "grouped_mm"
        for name in EXPERTS_IMPLEMENTATIONS:
            loaded.set_experts_implementation(name)
            assert loaded.config.text_config._experts_implementation == name


@pytest.mark.parametrize("name", EXPERTS_IMPLEMENTATIONS)
def test_experts_implementation_can_be_chosen_when_loading(make_student, tmp_path, name):
    make_student().save_pretrained(tmp_path)
    loaded = LlavaModForConditionalGeneration.from_pretrained(tmp_path, experts_implementation=name)
    assert {block.experts.config._experts_implementation for block in moe_blocks(loaded)} == {name}


@torch.no_grad()
def test_router_runs_in_float32_under_autocast(sparse, batch):
    given = []
    hooks = [
        block.gate.register_forward_pre_hook(lambda module, args: given.append(args[0])) for block in moe_blocks(sparse)
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        router_logits = sparse(**batch, output_router_logits=True).router_logits
    for hook in hooks:
        hook.remove()
    for block, hidden_states, logits in zip(moe_blocks(sparse), given, router_logits, strict=True):
        assert logits.dtype == torch.float32
        assert torch.equal(logits, F.linear(hidden_states.float(), block.gate.weight.float()))


@torch.no_grad()
def test_router_of_a_bfloat16_student_runs_in_float32(make_student):
    student = sharpen(make_student()).to(torch.bfloat16)
    hidden_states = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for block in moe_blocks(student):
        router_logits, top_k_weights, _ = block.gate(hidden_states)
        assert router_logits.dtype == torch.float32
        assert torch.equal(router_logits, F.linear(hidden_states.float(), block.gate.weight.float()))
        assert top_k_weights.dtype == torch.bfloat16


@torch.no_grad()
def test_a_row_alone_equals_itself_in_a_left_padded_batch(sparse, processor, batch):
    logits = sparse(**batch).logits
    assert not batch["attention_mask"].all()
    for row, question in enumerate(QUESTIONS):
        images = image_paths("test")
        text = f"<|user|><image>{question}<|assistant|>"
        alone = processor(text=text, images=list(images.values())[row], return_tensors="pt")
        expected = sparse(**alone).logits[0]
        assert_same_logits(logits[row, -len(expected) :], expected)


@torch.no_grad()
def test_generating_with_the_cache_equals_generating_without(sparse, batch):
    # without the end token, which would stop rows early
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with_cache = sparse.generate(**batch, **greedy, use_cache=True)
    without = sparse.generate(**batch, **greedy, use_cache=False)
    assert with_cache.shape[1] == batch["input_ids"].shape[1] + 8
    assert torch.equal(with_cache, without)
    assert len(set(with_cache[:, -8:].flatten().tolist())) > 4  # not the same token over and over


@torch.no_grad()
def test_logits_to_keep(sparse, batch):
    logits = sparse(**batch).logits
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask[0, -1] = mask[1, -4] = mask[3, -2:] = True
    kept = sparse(**batch, logits_to_keep=mask).logits
    assert kept.shape == (4, logits.shape[-1])
    assert_same_logits(kept, logits[mask])
    assert_same_logits(sparse(**batch, logits_to_keep=2).logits, logits[:, -2:])


@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_number_of_image_tokens_is_refused(sparse, batch, change):
    (row,) = (batch["input_ids"][:1] == sparse.config.image_token_index).nonzero()[:1, 1].tolist()
    row_ids = batch["input_ids"][:1].clone()
    row_ids[0, row] = row_ids[0, -1] if change < 0 else row_ids[0, row]
    if change > 0:
        row_ids[0, -1] = sparse.config.image_token_index
    with pytest.raises(ValueError, match=f"tokens: {16 + change}, features: "):
        sparse(input_ids=row_ids, pixel_values=batch["pixel_values"][:1])


def test_input_ids_and_embeddings_exclude_each_other(sparse, batch):
    embeddings = sparse.get_input_embeddings()(batch["input_ids"])
    for inputs in ({}, {"input_ids": batch["input_ids"], "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            sparse(**inputs)


@torch.no_grad()
def test_input_embeddings_give_the_same_logits(sparse, batch):
    embeddings = sparse.get_input_embeddings()(batch["input_ids"])
    inputs = {name: value for name, value in batch.items() if name != "input_ids"}
    logits = sparse(inputs_embeds=embeddings, **inputs).logits
    assert_same_logits(logits, sparse(**batch).logits)


def test_the_familys_activation_is_the_experts():
    text_config = LlamaConfig(**TINY_TEXT, hidden_act="relu")
    (block,) = moe_blocks(LlavaModForConditionalGeneration(sparse_config(text_config)))
    assert isinstance(block.experts.act_fn, torch.nn.ReLU)


def assert_initialised(model, std):
    for block in moe_blocks(model):
        for parameter in block.parameters():
            tolerance = 5 * std / (2 * parameter.numel()) ** 0.5  # five standard errors
            assert parameter.std().item() == pytest.approx(std, abs=tolerance)
            assert abs(parameter.mean().item()) < 5 * std / parameter.numel() ** 0.5


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_new_routers_and_experts_are_initialised(make_student, std):
    config = make_student().config
    config.text_config.initializer_range = std
    assert_initialised(LlavaModForConditionalGeneration(config), std)


def test_a_towers_missing_weights_are_drawn_as_its_family_does():
    vision_config = {"model_type": "clip_vision_model", **TINY_SIZES, "image_size": 64, "patch_size": 16}
    config = LlavaModConfig(vision_config=vision_config, text_config=LlamaConfig(**TINY_TEXT))
    model = LlavaModForConditionalGeneration.from_pretrained(None, config=config, state_dict={})
    for layer in model.model.vision_tower.encoder.layers:
        # CLIP has 1 / √width there, and 0.02 where nothing else is said
        assert layer.self_attn.out_proj.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)


def test_a_checkpoint_that_lacks_weights_is_refused_by_the_stages_alone(make_student, tmp_path):
    make_student(moe_layers=[]).save_pretrained(tmp_path)
    message = r"has 6 of the model's weights not at all.*: model\.language_model\.layers\.0\.mlp\.experts\.down_proj"
    config = make_student().config
    with pytest.raises(ValueError, match=message):
        load_whole(LlavaModForConditionalGeneration, tmp_path, config=config)
    # transformers reports and initialises: routers too
    assert_initialised(
        LlavaModForConditionalGeneration.from_pretrained(tmp_path, config=config), config.text_config.initializer_range
    )


@torch.no_grad()
def test_saving_and_loading_gives_the_same_model(sparse, batch, tmp_path):
    sparse.save_pretrained(tmp_path)
    loaded, report = LlavaModForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded(**batch).logits, sparse(**batch).logits)
    for auto_class, model_class in (
        (AutoModelForImageTextToText, LlavaModForConditionalGeneration),
        (AutoModel, LlavaModModel),
    ):
        assert type(auto_class.from_pretrained(tmp_path)) is model_class
    state, loaded_state = sparse.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(torch.equal(state[name], loaded_state[name]) for name in state)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


@torch.no_grad()
def test_stock_classes_are_left_as_they_were(sparse):
    for config_class, model_class in ((LlamaConfig, LlamaModel), (Qwen2Config, Qwen2Model)):
        stock = model_class(config_class(**TINY_TEXT, num_key_value_heads=2))
        assert "router_logits" not in stock._can_record_outputs
        assert "router_logits" not in stock(torch.arange(8)[None], output_router_logits=True)
        assert not any(isinstance(module, LlavaModExperts) for module in stock.modules())
