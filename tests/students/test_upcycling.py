"""Upcycling: a sparse student that computes what the dense one did."""

import copy
import re

import pytest
import torch
from transformers import CONFIG_MAPPING, LlavaConfig, LlavaForConditionalGeneration

from helpers.models import (
    IMAGE_TOKEN,
    SMALL,
    VISION,
    assert_same_logits,
    image_batch,
    image_inputs,
    make_dense,
    sharpen,
    stock_twin,
)
from llava_mod_hf import LlavaModForConditionalGeneration, upcycle
from llava_mod_hf.students.upcycling import moe_layer_indices


@pytest.fixture(scope="module")
def batch(processor):
    return image_batch(processor, ["is there a red circle?", "what color is it?", "?"])


@pytest.fixture(scope="module")
def dense(make_student):
    return sharpen(make_student(moe_layers=[]))


@torch.no_grad()
def assert_same_student(sparse, dense, batch):
    assert_same_logits(sparse(**batch).logits, dense(**batch).logits)


@pytest.mark.parametrize("layers", ["alternate", "all", [1]])
@pytest.mark.parametrize("stock", [False, True], ids=["student", "stock"])
@pytest.mark.parametrize("text_model_type", ["llama", "qwen2"])
def test_logits_stay_and_the_input_too(make_student, batch, text_model_type, stock, layers):
    model = sharpen(make_student(moe_layers=[], text_model_type=text_model_type))
    model = stock_twin(model) if stock else model
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()

    sparse = upcycle(model, layers=layers)

    assert isinstance(sparse, LlavaModForConditionalGeneration)
    assert_same_student(sparse, model, batch)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    assert model.config.to_dict() == config
    assert not getattr(model.config.get_text_config(), "moe_layers", [])
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert not shared & {parameter.data_ptr() for parameter in sparse.parameters()}


@torch.no_grad()
def test_a_stock_llava_over_a_family_whose_head_has_a_bias():
    text_config = CONFIG_MAPPING["phi"](**SMALL)
    values = {"image_token_index": IMAGE_TOKEN, "image_seq_length": 4, "vision_feature_select_strategy": "full"}
    config = LlavaConfig(vision_config=VISION, text_config=text_config, vision_feature_layer=-1, **values)
    stock = sharpen(LlavaForConditionalGeneration(config).eval())
    sparse = upcycle(stock)
    assert sparse.lm_head.bias is not None
    assert_same_student(sparse, stock, image_inputs())


@pytest.mark.parametrize(("num_experts", "num_experts_per_tok"), [(2, 1), (4, 4), (6, 3)])
def test_any_number_of_experts(dense, batch, num_experts, num_experts_per_tok):
    sparse = upcycle(dense, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
    assert_same_student(sparse, dense, batch)
    block = sparse.model.language_model.layers[0].mlp
    assert block.experts.gate_up_proj.shape[0] == block.gate.weight.shape[0] == num_experts
    assert (sparse.config.num_experts, sparse.config.num_experts_per_tok) == (num_experts, num_experts_per_tok)


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        ("alternate", 5, [0, 2, 4]),
        ("alternate", 4, [0, 2]),
        ("all", 3, [0, 1, 2]),
        ("first_half", 5, [0, 1]),
        ("second_half", 5, [2, 3, 4]),
        ("first_half", 4, [0, 1]),
        ("second_half", 4, [2, 3]),
        ([2, 0], 3, [0, 2]),
    ],
)
def test_placements(layers, num_layers, expected):
    assert moe_layer_indices(layers, num_layers) == expected


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("alternate", [0, 2]), ("all", [0, 1, 2]), ("first_half", [0]), ("second_half", [1, 2]), ([2], [2])],
)
def test_the_sparse_layers_are_those_of_the_placement(dense, layers, expected):
    sparse = upcycle(dense, layers=layers)
    assert sparse.config.moe_layers == expected
    found = [i for i, layer in enumerate(sparse.model.language_model.layers) if hasattr(layer.mlp, "experts")]
    assert found == expected


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_stay_tied_or_apart(make_student, batch, tied):
    config = copy.deepcopy(make_student(moe_layers=[]).config)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = sharpen(LlavaModForConditionalGeneration(config).eval())
    sparse = upcycle(model)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert (sparse.lm_head.weight is sparse.get_input_embeddings().weight) == tied
    assert torch.equal(sparse.lm_head.weight, model.lm_head.weight)
    assert_same_student(sparse, model, batch)


@pytest.mark.parametrize("training", [True, False])
def test_precision_and_mode_stay(make_student, training):
    model = make_student(moe_layers=[]).to(torch.bfloat16).train(training)
    sparse = upcycle(model)
    assert {parameter.dtype for parameter in sparse.parameters()} == {torch.bfloat16}
    assert sparse.dtype == torch.bfloat16
    assert all(module.training == training for module in sparse.modules())


def test_rotary_frequencies_keep_their_precision(dense, tmp_path):
    dense.save_pretrained(tmp_path)
    model = LlavaModForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    sparse = upcycle(model)
    buffers = dict(model.named_buffers())
    assert buffers["model.language_model.rotary_emb.inv_freq"].dtype == torch.float32
    for name, buffer in sparse.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name]), name


def test_generation_config_stays(make_student):
    model = make_student(moe_layers=[])
    model.generation_config.update(max_new_tokens=17, eos_token_id=[1, 5])
    sparse = upcycle(model)
    assert sparse.generation_config.to_dict() == model.generation_config.to_dict()
    assert sparse.generation_config is not model.generation_config


def test_router_losses_are_stored(dense):
    assert upcycle(dense).config.router_aux_loss_coef == 0.01
    values = {"router_aux_loss_coef": 0.3, "router_aux_loss_type": "pooled", "router_z_loss_coef": 0.01}
    text_config = upcycle(dense, **values).config.get_text_config()
    assert {name: getattr(text_config, name) for name in values} == values


def test_routers_follow_the_seed_alone(dense):
    routers = []
    for seed, global_seed in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        sparse = upcycle(dense, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        routers.append(sparse.model.language_model.layers[2].mlp.gate.weight)
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
    assert routers[0].std() > 0.01  # not all tokens to the first expert


def test_each_router_starts_elsewhere(dense):
    layers = upcycle(dense).model.language_model.layers
    assert not torch.equal(layers[0].mlp.gate.weight, layers[2].mlp.gate.weight)


def test_an_upcycled_student_can_be_saved_and_loaded(dense, batch, tmp_path):
    upcycle(dense).save_pretrained(tmp_path)
    loaded = LlavaModForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.moe_layers == [0, 2]
    assert_same_student(loaded, dense, batch)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": "odd"}, "`layers` is 'odd': give one of alternate, all, first_half, second_half"),
        ({"layers": []}, "No layer of the 3 is selected"),
        ({"layers": [0, 3]}, r"`moe_layers` is \[0, 3\].* 3 layers"),
        ({"layers": [1, 1]}, "distinct"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "`num_experts_per_tok` is 3 and `num_experts` is 2"),
        ({"expert_rank": 0}, "`expert_rank` is 0: give an integer of at least 1"),
        ({"router_aux_loss_type": "none"}, "`router_aux_loss_type` is 'none'"),
    ],
)
def test_what_cannot_be_is_refused(dense, values, message):
    with pytest.raises(ValueError, match=message):
        upcycle(dense, **values)


def test_a_sparse_student_is_refused(make_student):
    with pytest.raises(ValueError, match=r"sparse already, in layers \[0, 2\]"):
        upcycle(make_student())


@pytest.mark.parametrize("layers", [None, [0], "all"], ids=["dense", "some", "all"])
def test_sharding_plans_name_what_is_there(layers):
    model = make_dense("llama")
    model = model if layers is None else upcycle(model, layers=layers)
    names = [name for name, _ in (*model.named_parameters(), *model.named_modules())]
    assert len(model.tp_plan) > 5
    for rule in (*model.tp_plan, *model._ep_plan):
        pattern = re.escape(rule).replace(r"\*", r"\d+")
        assert any(re.match(pattern + r"(\.weight|\.bias)?$", name) for name in names), rule
    assert bool(model._ep_plan) == (layers is not None)
