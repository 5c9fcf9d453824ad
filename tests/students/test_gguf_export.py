"""GGUF files: llama.cpp computes what the student does, in every family that is not refused."""

import re
import sys

import numpy as np
import pytest
import torch

from helpers import llama_cpp
from helpers.retyped import retyped
from llava_mod_cli import main
from llava_mod_hf import merge_experts
from llava_mod_hf.students.gguf_export import export_gguf, find_architecture
from llava_mod_hf.students.router_bias import add_router_bias, router_biases

NOUNS = ("circle", "square", "red thing", "blue shape in the corner")

PROMPTS = [
    f"<|user|>{question.format(noun)}<|assistant|>"
    for question in ("is there a {}?", "what color is the {}?", "describe 12 {}s...", "No {}'s here — é ☃?", "{}")
    for noun in NOUNS
]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}

# family, sparse layers, fields → the graph
CASES = {
    "llama, alternate": ("llama", [0, 2], {}, "llama"),
    "llama, all, low rank": ("llama", [0, 1, 2], {"expert_rank": 3}, "llama"),
    "llama, own head, biases, fewer heads of K": (
        "llama",
        [1],
        {"attention_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 1},
        "llama",
    ),
    "llama 3's frequencies": ("llama", [0], {"rope_parameters": LLAMA3, "head_dim": 32}, "llama"),
    "llama, dense, biases": ("llama", [], {"attention_bias": True, "mlp_bias": True}, "llama"),
    "mistral": ("mistral", [0, 1, 2], {"sliding_window": None}, "llama"),
    "qwen2, alternate": ("qwen2", [0, 2], {}, "llama"),
    "qwen2, all, low rank": ("qwen2", [0, 1, 2], {"expert_rank": 2}, "llama"),
    "qwen2, dense": ("qwen2", [], {}, "qwen2"),
    "qwen3, alternate": ("qwen3", [0, 2], {"head_dim": 32}, "qwen3moe"),
    "qwen3, all, low rank": ("qwen3", [0, 1, 2], {"expert_rank": 3, "num_key_value_heads": 1}, "qwen3moe"),
    "qwen3, dense": ("qwen3", [], {"head_dim": 32}, "qwen3"),
}


def make(make_student, name):
    kind, layers, fields, _ = CASES[name]
    student = retyped(make_student, kind, moe_layers=layers, **fields)
    torch.manual_seed(2)
    for name, parameter in [*student.model.language_model.named_parameters(), *student.lm_head.named_parameters()]:
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif "expert" not in name and ".gate." not in name:
            torch.nn.init.normal_(parameter, std=0.3)  # answers that differ; biases are zero at first
    return student


@torch.no_grad()
def largest_gap(student, tokenizer, answers):
    """The largest difference of a probability; tokens and greedy choices have to be the same ones."""
    gaps, words = [], set()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer["tokens"] == tokenizer(prompt).input_ids, prompt
        input_ids = torch.tensor([answer["tokens"] + answer["generated"][:-1]])
        logits = student(input_ids=input_ids).logits[0, len(answer["tokens"]) - 1 :]
        assert logits.argmax(-1).tolist() == answer["generated"], prompt
        found = torch.tensor(answer["probabilities"], dtype=torch.float64)
        gaps.append((logits.double().softmax(-1) - found).abs().max().item())
        words.update(answer["generated"])
    assert len(words) > 20  # not one answer to everything
    return max(gaps)


@pytest.fixture
def gguf():
    return llama_cpp.package()


@pytest.fixture
def student(make_student):
    return make(make_student, "qwen2, alternate")


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_the_same(gguf, make_student, processor, tmp_path, name):
    student = make(make_student, name)
    path, _ = export_gguf(student, processor, tmp_path, gguf_type="f32")
    assert find_architecture(student).name == CASES[name][-1]
    assert largest_gap(student, processor.tokenizer, llama_cpp.answers(path, PROMPTS)) < 2e-5


def test_llama_cpp_computes_a_merged_student(gguf, make_student, processor, tmp_path):
    merged = merge_experts(make(make_student, "qwen3, alternate"))
    path, _ = export_gguf(merged, processor, tmp_path, gguf_type="f32")
    assert largest_gap(merged, processor.tokenizer, llama_cpp.answers(path, PROMPTS)) < 2e-5


@pytest.mark.parametrize(
    ("gguf_type", "error", "size"), [("f16", 5e-4, 0.51), ("q8_0", 5e-3, 0.28), ("q4_0", 0.126, 0.16)]
)
def test_matrices_are_of_the_type_that_is_asked_for(gguf, student, processor, tmp_path, gguf_type, error, size):
    exact, _ = export_gguf(student, processor, tmp_path / "f32", gguf_type="f32")
    path, _ = export_gguf(student, processor, tmp_path / gguf_type, gguf_type=gguf_type)
    found, expected = (gguf.GGUFReader(file).tensors for file in (path, exact))
    assert [tensor.name for tensor in found] == [tensor.name for tensor in expected]
    weights = 0
    for tensor, whole in zip(found, expected, strict=True):
        name, data = tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = {"q4_0": "q8_0"}.get(gguf_type, gguf_type) if name == "token_embd.weight" else gguf_type
        kept = name.endswith(("norm.weight", "ffn_gate_inp.weight", ".bias"))
        assert tensor.tensor_type.name == ("F32" if kept else kind.upper()), name
        assert np.abs(data - whole.data).max() <= (0 if kept else error * np.abs(whole.data).max()), name
        weights += tensor.n_bytes / sum(part.n_bytes for part in expected)
    assert weights == pytest.approx(size, abs=0.02)


def test_rows_that_are_no_multiple_of_32_are_of_16_bits(gguf, make_student, processor, tmp_path):
    student = retyped(make_student, "llama", moe_layers=[0], intermediate_size=48)
    tensors = gguf.GGUFReader(export_gguf(student, processor, tmp_path, gguf_type="q8_0")[0]).tensors
    assert {t.tensor_type.name for t in tensors if "ffn_down" in t.name} == {"F16"}
    assert {t.tensor_type.name for t in tensors if "ffn_up" in t.name} == {"Q8_0"}


SLIDING = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 3}

REFUSED = [
    ("gemma2", [], {}, "of the family gemma2"),
    ("phi3", [0], {}, "of the family phi3"),
    ("llama", [0], {"mlp_bias": True}, "biases"),
    ("llama", [0, 1, 2], {"mlp_bias": True}, "biases"),
    ("qwen3", [0], {"attention_bias": True}, "biases, such as that of `layers.0.self_attn.k_proj`"),
    ("llama", [], {"hidden_act": "gelu"}, "the activation gelu"),
    ("mistral", [0], {"sliding_window": 8}, "sliding attention over 8 tokens"),
    ("qwen2", [0], SLIDING, "sliding attention over 8"),
    ("qwen2", [0], {"use_residual": True}, "dense FFN beside its experts"),
    ("qwen2", [], {"rope_parameters": LLAMA3}, "rotary embedding (llama3)"),
    ("llama", [], {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "embedding (yarn)"),
    ("llama", [], {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "(dynamic)"),
    ("qwen2", [], {"head_dim": 8}, "heads that are wider or narrower"),
]


@pytest.mark.parametrize(("kind", "layers", "fields", "message"), REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(make_student, kind, layers, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_architecture(retyped(make_student, kind, moe_layers=layers, **fields))


def test_a_bias_of_the_routers_is_refused(make_student):
    student = retyped(make_student, "qwen2", moe_layers=[0])
    add_router_bias(student)
    assert find_architecture(student).name  # a bias of nothing changes no choice
    router_biases(student)[0][1] = 0.1
    with pytest.raises(ValueError, match="chooses experts by a bias of its routers"):
        find_architecture(student)


def test_a_window_wider_than_any_prompt_is_none(make_student):
    student = retyped(make_student, "mistral", moe_layers=[0], sliding_window=4096, max_position_embeddings=4096)
    assert find_architecture(student).name == "llama"


def run(capsys, *arguments):
    return main(["export", *map(str, arguments)]), capsys.readouterr().err


def test_the_command_writes_the_file_and_never_over_another(gguf, student, processor, tmp_path, capsys):
    student.save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    arguments = ("--model", tmp_path / "student", "--output_dir", tmp_path / "out", "--form", "gguf")
    assert run(capsys, *arguments, "--gguf_type", "q8_0")[0] == 0
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert tensors["blk.1.ffn_up_exps.weight"].tensor_type.name == "Q8_0"  # layer 1 is dense
    assert not tensors["blk.1.ffn_gate_inp.weight"].data.any()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mmproj.gguf", "model.gguf"]
    code, error = run(capsys, *arguments)
    assert code == 2 and "is there already" in error
    code, error = run(capsys, *arguments[:-1], "stock", "--gguf_type", "q8_0")
    assert code == 2 and "only `gguf` has it" in error
    code, error = run(capsys, *arguments, "--gguf_type", "q5_k")
    assert code == 2 and "give one of f32, f16, q8_0, q4_0" in error


def test_without_the_package_the_command_says_how_to_get_it(student, processor, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=re.escape("pip install llava-mod-hf[gguf]")):
        export_gguf(student, processor, tmp_path)
