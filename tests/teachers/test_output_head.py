"""The heads of the families, and what is not understood of one."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from helpers.live_teacher_cases import logits_of
from llava_mod_hf.teachers.output_head import head_of

# --- heads of the families ---

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


FAMILIES = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=5.0)),
    "phi": (PhiForCausalLM, PhiConfig(**SMALL)),
    "cohere": (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.25)),
    "granite": (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=8.0)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_the_familys(family, dtype):
    model_class, config = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config).eval()
    layer = model.get_output_embeddings()
    layer.weight.data.mul_(20)
    if layer.bias is not None:
        layer.bias.data.normal_()
    model.to(dtype)
    head = head_of(model)
    ids = torch.arange(8)[None]
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    expected = model(input_ids=ids).logits[0].double()
    found = logits_of(hidden, head)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    plain = hidden.double() @ head.weight.double().T
    assert not torch.allclose(plain, expected, rtol=0.05), "the family's own step must matter here"
    assert not layer._forward_hooks


def test_an_option_that_the_class_does_not_use_is_not_the_heads(make_teacher, tokenizer):
    model, _ = make_teacher()
    model.config.text_config.final_logit_softcapping = 5.0  # as stock LLaVA over Gemma2 has it
    assert head_of(model).softcap is None


def test_a_head_that_is_not_understood_is_refused(make_teacher):
    model, _ = make_teacher()

    def square(module, args, output):
        output.logits = output.logits**2

    model.register_forward_hook(square)
    with pytest.raises(ValueError, match="no scale and no softcap"):
        head_of(model)
