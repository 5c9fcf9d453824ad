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

from helpers.models import assert_same_logits, image_batch, moe_blocks, sharpen, stock_twin
from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration, LlavaModModel
from llava_mod_hf.data.easy_vqa import image_paths
from llava_mod_hf.loading import load_whole
from llava_mod_hf.model.moe_llava_mod import LlavaModExperts, router_losses

EXPERTS_IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
QUESTIONS = ["is there a red circle?", "what color is it?", "what shape is the blue shape?", "?"]
TINY_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_TEXT = {**TINY_SIZES, "vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1}
TINY_VISION = {"model_type": "siglip_vision_model", **TINY_SIZES, "image_size": 64, "vision_use_head": False}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def text_model_type(request):
    return request.param


@pytest.fixture(scope="module")
def dense(make_student, text_model_type):
    return sharpen(make_student(moe_layers=[], text_model_type=text_model_type))


@pytest.fixture(scope="module")
def sparse(make_student, text_model_type):
    return sharpen(make_student(moe_layers=[0, 2], text_model_type=text_model_type))


@pytest.fixture(scope="module")
def batch(processor):
    return image_batch(processor, QUESTIONS)


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


# Dense students against transformers


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


# The mixture-of-experts block


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


# Padding, cache, positions


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


# Router logits and losses


@torch.no_grad()
def test_router_logits_only_when_asked_for(sparse, batch):
    tokens = batch["input_ids"].numel()
    for model in (sparse, sparse.model):
        assert model(**batch).router_logits is None
        router_logits = model(**batch, output_router_logits=True).router_logits
        assert [tuple(logits.shape) for logits in router_logits] == [(tokens, 4), (tokens, 4)]
    sparse.config.output_router_logits = True
    try:
        assert len(sparse(**batch).router_logits) == 2
        assert sparse(**batch, output_router_logits=False).router_logits is None
    finally:
        sparse.config.output_router_logits = False


@torch.no_grad()
def test_router_logits_are_in_the_order_of_the_layers(sparse, batch):
    seen = []
    hooks = [
        block.gate.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        for block in moe_blocks(sparse)
    ]
    router_logits = sparse(**batch, output_router_logits=True).router_logits
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(given, expected) for given, expected in zip(router_logits, seen, strict=True))
    assert not torch.equal(*router_logits)


def switch_by_hand(router_logits, mask):
    """Experts times share of first choices times mean probability, token by token in float64, summed over layers."""
    total = 0.0
    for logits in router_logits:
        rows = logits.double()[mask.flatten().bool()]
        probabilities = rows.exp() / rows.exp().sum(-1, keepdim=True)
        for expert in range(rows.shape[1]):
            share = sum(1 for row in rows if row.argmax() == expert) / len(rows)
            total = total + rows.shape[1] * share * probabilities[:, expert].sum() / len(rows)
    return total


def pooled_by_hand(router_logits, mask, top_k):
    """As transformers: all choices count, and the layers are one big batch."""
    rows = torch.cat([logits.double()[mask.flatten().bool()] for logits in router_logits])
    probabilities = rows.exp() / rows.exp().sum(-1, keepdim=True)
    chosen = [set(row.argsort(descending=True)[:top_k].tolist()) for row in rows]
    shares = [sum(expert in choices for choices in chosen) / len(rows) for expert in range(rows.shape[1])]
    return rows.shape[1] * sum(share * probabilities[:, expert].mean() for expert, share in enumerate(shares))


def z_by_hand(router_logits, mask):
    rows = [logits.double()[mask.flatten().bool()] for logits in router_logits]
    return sum(sum(row.exp().sum().log() ** 2 for row in layer) / len(layer) for layer in rows)


@pytest.mark.parametrize("loss_type", ["switch", "pooled"])
def test_router_losses_against_sums_written_out(loss_type):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(12, 4, generator=generator, requires_grad=True) for _ in range(2)]
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0]])
    config = LlamaConfig(num_experts=4, num_experts_per_tok=2, router_aux_loss_type=loss_type)
    by_hand = switch_by_hand(leaves, mask) if loss_type == "switch" else pooled_by_hand(leaves, mask, 2)
    for found, expected in zip(router_losses(leaves, config, mask), (by_hand, z_by_hand(leaves, mask)), strict=True):
        assert found.item() == pytest.approx(expected.item(), abs=1e-5)
        found_gradients = torch.autograd.grad(found, leaves, retain_graph=True)
        expected_gradients = torch.autograd.grad(expected, leaves, retain_graph=True)
        assert all(gradient.abs().max() > 1e-3 for gradient in expected_gradients)
        torch.testing.assert_close(found_gradients, expected_gradients, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("loss_type", ["switch", "pooled"])
def test_loss_and_router_losses(make_student, batch, loss_type):
    sparse = sharpen(make_student())
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    plain = sparse(**batch, labels=labels)
    expected = F.cross_entropy(plain.logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())
    assert plain.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert plain.aux_loss is None

    assert (sparse.config.router_aux_loss_type, sparse.config.router_z_loss_coef) == ("switch", 0.0)
    sparse.config.router_aux_loss_type, sparse.config.router_z_loss_coef = loss_type, 0.5
    outputs = sparse(**batch, labels=labels, output_router_logits=True)
    arguments = (outputs.router_logits, batch["attention_mask"])
    aux = switch_by_hand(*arguments) if loss_type == "switch" else pooled_by_hand(*arguments, 2)
    assert outputs.aux_loss.item() == pytest.approx(aux.item(), abs=1e-5)
    unmasked = torch.ones_like(batch["attention_mask"])
    arguments = (outputs.router_logits, unmasked)
    other = switch_by_hand(*arguments) if loss_type == "switch" else pooled_by_hand(*arguments, 2)
    assert abs(outputs.aux_loss.item() - other.item()) > 1e-3  # padding would have made a difference
    assert sparse.config.router_aux_loss_coef == 0.01
    z = z_by_hand(outputs.router_logits, batch["attention_mask"])
    assert outputs.loss.item() == pytest.approx(plain.loss.item() + 0.01 * aux.item() + 0.5 * z.item(), abs=1e-4)


@pytest.mark.parametrize("coef", [0.0, 0.5])
def test_gradients_reach_routers_and_experts(make_student, batch, coef):
    student = sharpen(make_student()).train()
    student.config.get_text_config().router_aux_loss_coef = coef
    student(**batch, labels=batch["input_ids"], output_router_logits=True).loss.backward()
    for block in moe_blocks(student):
        assert block.gate.weight.grad.abs().max() > 1e-6
        for parameter in block.experts.parameters():
            assert (parameter.grad.abs().amax(dim=(1, 2)) > 1e-6).all()  # each expert is some token's choice


def test_the_routers_gradient_holds_the_aux_loss(make_student, batch):
    gradients = []
    for coef in (0.0, 1.0):
        student = sharpen(make_student())
        student.config.get_text_config().router_aux_loss_coef = coef
        student(**batch, labels=batch["input_ids"], output_router_logits=True).loss.backward()
        gradients.append(moe_blocks(student)[0].gate.weight.grad)
    student.zero_grad()
    outputs = student(**batch, output_router_logits=True)
    switch_by_hand(outputs.router_logits, batch["attention_mask"]).backward()
    aux_gradient = moe_blocks(student)[0].gate.weight.grad
    assert aux_gradient.abs().max() > 1e-4
    torch.testing.assert_close(gradients[1] - gradients[0], aux_gradient, rtol=1e-3, atol=1e-5)


# Construction, saving, loading


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
