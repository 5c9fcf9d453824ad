"""The last FFN at the positions that are read: the same figures and gradients, of fewer positions."""

import copy
import gc

import pytest
import torch

from helpers.ddp_gradients import assert_gradients_close
from helpers.positions import positions_seen
from llava_mod_hf.teachers import last_ffn
from llava_mod_hf.teachers.last_ffn import read_only


def inputs_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 100, (2, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("text_model_type", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_figures_and_gradients_are_the_same_where_they_are_read(make_student, text_model_type, checkpointed):
    model = make_student(moe_layers=[0], text_model_type=text_model_type).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    read = torch.zeros(2, 12, dtype=torch.bool)
    read[0, 3:5] = read[1, 9] = True
    found = []
    for only in (False, True):
        if only:
            read_only(model.base_model, read)

        def step():
            hidden = model.base_model(**inputs_of(model)).last_hidden_state[read]
            hidden.square().sum().backward()
            return hidden.detach()

        hidden, seen = positions_seen(model, step)
        assert seen == [3 if only else 24] * (1 + checkpointed)
        found.append((hidden, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    (expected, expected_gradients), (hidden, gradients) = found
    torch.testing.assert_close(hidden, expected)
    assert gradients.keys() == expected_gradients.keys()
    assert_gradients_close(gradients, expected_gradients)


def test_it_is_of_the_next_forward_pass_alone(make_student):
    model = make_student(moe_layers=[])
    expected = model.base_model(**inputs_of(model)).last_hidden_state
    read_only(model.base_model, torch.eye(2, 12, dtype=torch.bool))
    _, seen = positions_seen(model, lambda: model.base_model(**inputs_of(model)))
    assert seen == [2]
    again, seen = positions_seen(model, lambda: model.base_model(**inputs_of(model)).last_hidden_state)
    assert seen == [24]
    torch.testing.assert_close(again, expected)
    _, seen = positions_seen(model, lambda: copy.deepcopy(model).base_model(**inputs_of(model)))
    assert seen == [24], "a copy is asked for nothing"
    answer = model.generate(**inputs_of(model), max_new_tokens=2, do_sample=False)
    assert answer.shape[1] == 14


def test_a_mixture_of_experts_runs_whole(make_student):
    model = make_student(moe_layers=[0, 2])
    read_only(model.base_model, torch.zeros(2, 12, dtype=torch.bool))
    outputs = model.base_model(**inputs_of(model), output_router_logits=True)
    assert [logits.shape[0] for logits in outputs.router_logits] == [24, 24]
    torch.testing.assert_close(outputs.last_hidden_state, model.base_model(**inputs_of(model)).last_hidden_state)


def test_nothing_to_read_has_gradients_of_zero(make_student):
    """As the wrappers of several processes want it."""
    model = make_student(moe_layers=[]).train()
    read_only(model.base_model, torch.zeros(2, 12, dtype=torch.bool))
    model.base_model(**inputs_of(model)).last_hidden_state.sum().backward()
    ffn = model.base_model.language_model.layers[-1].mlp
    assert all(p.grad is not None and not p.grad.any() for p in ffn.parameters())


def test_it_is_forgotten_with_the_model(make_student):
    gc.collect()
    before = len(last_ffn._KNOWN)
    model = make_student(moe_layers=[])
    read_only(model.base_model, torch.zeros(2, 12, dtype=torch.bool))
    assert len(last_ffn._KNOWN) == before + 1
    del model
    gc.collect()
    assert len(last_ffn._KNOWN) == before
