"""Low-rank experts, against the dense FFN of each expert written out, token by token, in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from llava_mod_hf.model.moe_llava_mod import LlavaModLowRankExperts

WIDTH, SIZE, EXPERTS, RANK, TOKENS = 6, 10, 4, 3, 9

FFNS = {"gate and up": (Qwen2MLP, "silu"), "one matrix": (Phi3MLP, "silu"), "no gate, biases": (PhiMLP, "gelu_new")}


def make_experts(name):
    ffn_class, activation = FFNS[name]
    config = SimpleNamespace(
        hidden_size=WIDTH, intermediate_size=SIZE, hidden_act=activation, num_experts=EXPERTS, expert_rank=RANK
    )
    torch.manual_seed(0)
    experts = LlavaModLowRankExperts(config, ffn_class(config)).double()
    for part in (experts.up_a, experts.up_b, experts.down_a, experts.down_b):
        torch.nn.init.normal_(part, std=0.5)
    return experts


def routed(tokens=TOKENS, per_token=2, used=EXPERTS):
    """Tokens, their experts, of the first `used` alone, and the router's probabilities of these."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=generator)
    index = torch.stack([torch.randperm(used, generator=generator)[:per_token] for _ in range(tokens)])
    return hidden, index, torch.rand(tokens, per_token, dtype=torch.float64, generator=generator) + 0.1


def gates_of(probabilities):
    """As the router gives them: those of a token sum to 1."""
    return probabilities / probabilities.sum(-1, keepdim=True)


def explicit(experts, hidden, index, gates):
    """Σ_j g_j · FFN_{e_j}(x), where the matrices of expert e are W + B_e A_e."""
    shared = dict(experts.shared.named_parameters())
    first, second = experts.layout.first, experts.layout.second
    rows = []
    for token in range(len(hidden)):
        total = 0
        for choice in range(index.shape[1]):
            e = index[token, choice]
            changes = (experts.up_b[e] @ experts.up_a[e]).chunk(len(first))
            parts = [
                F.linear(hidden[token], shared[f"{name}.weight"] + change, shared.get(f"{name}.bias"))
                for name, change in zip(first, changes, strict=True)
            ]
            if experts.layout.gated:
                gate, up = parts if len(parts) == 2 else parts[0].chunk(2)
                inner = F.silu(gate) * up
            else:
                inner = F.gelu(parts[0], approximate="tanh")
            weight = shared[f"{second}.weight"] + experts.down_b[e] @ experts.down_a[e]
            total = total + gates[token, choice] * F.linear(inner, weight, shared.get(f"{second}.bias"))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("name", list(FFNS))
@pytest.mark.parametrize(("per_token", "used"), [(2, EXPERTS), (1, EXPERTS), (3, 3)], ids=["top-2", "top-1", "unused"])
def test_values_and_gradients_are_those_of_whole_experts(name, per_token, used):
    experts = make_experts(name)
    hidden, index, probabilities = routed(per_token=per_token, used=used)
    weight = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    found = []
    for call in (explicit, lambda experts, *inputs: experts(*inputs)):
        inputs = hidden.clone().requires_grad_(), probabilities.clone().requires_grad_()
        output = call(experts, inputs[0], index, gates_of(inputs[1]))
        gradients = torch.autograd.grad((output * weight).sum(), [*inputs, *experts.parameters()])
        found.append((output.detach(), gradients))
    (expected, expected_gradients), (output, gradients) = found
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-12)
    assert all(gradient.any() for gradient in (gradients[0], *gradients[2:]))


def test_one_precision_under_autocast():
    """Whatever the precision of what is multiplied, as where the matrices are float32 and their products bfloat16."""
    experts = make_experts("gate and up").float()
    hidden, index, probabilities = routed()
    inputs = hidden.float(), index, gates_of(probabilities).float()
    expected = experts(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = experts(*inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
