"""Fewer experts: the ones with the largest load stay as they are, or take in the others by their load."""

import copy

import pytest
import torch

from helpers.models import assert_same_logits, image_batch
from helpers.retyped import retyped
from llava_mod_hf import compress_experts

LOADS = {0: [0.1, 0.4, 0.3, 0.2], 2: [0.45, 0.05, 0.1, 0.4]}


@pytest.fixture
def student(make_student):
    return retyped(make_student, "llama", moe_layers=[0, 2])


def block(model, layer):
    return model.model.language_model.layers[layer].mlp


def test_the_experts_with_the_largest_load_stay_as_they_are(student):
    before = copy.deepcopy(student.state_dict())
    smaller, done = compress_experts(student, loads=LOADS, num_experts=2)
    assert done == {
        "was": 4,
        "now": 2,
        "how": "drop",
        "kept": {0: [1, 2], 2: [0, 3]},
        "load": {0: 0.7, 2: 0.85},
    }
    assert (smaller.config.num_experts, smaller.config.num_experts_per_tok) == (2, 2)
    for layer, kept in done["kept"].items():
        found, old = block(smaller, layer), block(student, layer)
        for name, value in found.state_dict().items():
            assert torch.equal(value, old.state_dict()[name][kept]), name
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_token_goes_to_the_best_of_those_that_remain(student, processor):
    """As if the router gave the others no chance."""
    smaller, done = compress_experts(student, loads=LOADS, num_experts=3)
    batch = image_batch(processor, ["is there a red circle?", "?"])
    for layer, kept in done["kept"].items():
        dropped = [expert for expert in range(4) if expert not in kept]
        block(student, layer).gate.register_forward_hook(lambda router, inputs, output, out=dropped: mask(output, out))
    with torch.no_grad():
        assert_same_logits(smaller(**batch).logits, student(**batch).logits)


def mask(output, dropped):
    logits = output[0].clone()
    logits[:, dropped] = -torch.inf
    weights, index = logits.softmax(-1).topk(2)
    return logits, weights / weights.sum(-1, keepdim=True), index


def test_others_are_merged_into_the_nearest_by_their_load(student):
    with torch.no_grad():  # in layer 0, expert 0 is next to expert 2, and expert 3 to expert 1
        for near, far in ((0, 2), (3, 1)):
            for parameter in block(student, 0).experts.parameters():
                parameter[near] = parameter[far] + 0.01
    smaller, done = compress_experts(student, loads=LOADS, num_experts=2, how="merge")
    assert done["kept"][0] == [1, 2]
    for name, value in block(smaller, 0).state_dict().items():
        old = block(student, 0).state_dict()[name].double()
        expected = torch.stack([(0.4 * old[1] + 0.2 * old[3]) / 0.6, (0.3 * old[2] + 0.1 * old[0]) / 0.4])
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)


def test_experts_that_nobody_chose_are_merged_without_a_load(student):
    loads = {0: [0.0, 1.0, 0.0, 0.0], 2: LOADS[2]}
    smaller, _ = compress_experts(student, loads=loads, num_experts=2, how="merge")
    assert all(value.isfinite().all() for value in smaller.state_dict().values())


def test_equal_experts_merge_into_the_same_model(make_student, processor):
    student = retyped(make_student, "qwen2", moe_layers=[0, 2])
    with torch.no_grad():
        for layer in (0, 2):
            for parameter in block(student, layer).experts.parameters():
                parameter[:] = parameter[:1].clone()
    batch = image_batch(processor, ["is there a red circle?", "?"])
    for how in ("drop", "merge"):
        smaller, _ = compress_experts(student, loads=LOADS, num_experts=2, how=how)
        with torch.no_grad():
            assert_same_logits(smaller(**batch).logits, student(**batch).logits)


@pytest.mark.parametrize("fields", [{"expert_rank": 3}, {"use_residual": True}])
def test_low_rank_and_residual_experts_are_dropped(make_student, processor, fields):
    student = retyped(make_student, "llama", moe_layers=[0, 2], **fields)
    smaller, done = compress_experts(student, loads=LOADS, num_experts=2)
    for name, value in block(smaller, 0).state_dict().items():
        old = block(student, 0).state_dict()[name]
        whole = "shared" in name or "residual" in name or "coefficient" in name
        assert torch.equal(value, old if whole else old[done["kept"][0]]), name


def test_biases_of_the_choice_stay_with_their_experts(make_student):
    student = retyped(make_student, "llama", moe_layers=[0, 2], router_bias=True)
    biases = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for layer in (0, 2):
        block(student, layer).gate.e_score_correction_bias.copy_(biases)
    smaller, done = compress_experts(student, loads=LOADS, num_experts=2)
    for layer, kept in done["kept"].items():
        assert torch.equal(block(smaller, layer).gate.e_score_correction_bias, biases[kept])


REFUSED = [
    ({"num_experts": 4}, "give 2 to 3"),
    ({"num_experts": 1}, "give 2 to 3"),
    ({"how": "forget"}, "give one of drop, merge"),
    ({"loads": {0: LOADS[0]}}, "`loads` is of the layers [0]"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_what_cannot_be_done_is_one_sentence(student, values, message):
    with pytest.raises(ValueError) as error:
        compress_experts(student, **{"loads": LOADS, "num_experts": 2, **values})
    assert message in str(error.value)


def test_dense_students_and_low_rank_merges_are_refused(make_student):
    with pytest.raises(ValueError, match="dense already"):
        compress_experts(make_student(moe_layers=[]), loads=LOADS, num_experts=2)
    with pytest.raises(ValueError, match="of rank 3"):
        compress_experts(
            retyped(make_student, "llama", moe_layers=[0, 2], expert_rank=3), loads=LOADS, num_experts=2, how="merge"
        )
