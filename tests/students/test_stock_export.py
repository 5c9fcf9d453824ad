"""Stock models from a student: experts averaged into dense FFNs, or kept in a stock mixture of experts."""

import copy
import json

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from helpers.models import assert_same_logits, image_batch, sharpen, stock_twin
from helpers.retyped import different_experts, retyped
from llava_mod_cli import main
from llava_mod_hf import export_stock, merge_experts, upcycle
from llava_mod_hf.students.router_bias import add_router_bias, router_biases
from llava_mod_hf.students.stock_export import expert_weights


@pytest.fixture(scope="module")
def batch(processor):
    return image_batch(processor, ["is there a red circle?", "what color is it?", "?"])


@pytest.fixture(scope="module")
def student(make_student):
    return different_experts(make_student())


# Merged


def test_equal_experts_merge_into_the_dense_model(make_student, batch):
    dense = sharpen(make_student(moe_layers=[]))
    sparse = upcycle(dense, layers="alternate")
    for kwargs in ({}, {"weights": "load", "loads": {0: [0.5, 0.5, 0, 0], 2: [0.1, 0.2, 0.3, 0.4]}}):
        merged = merge_experts(sparse, **kwargs)
        assert type(merged) is LlavaForConditionalGeneration
        for name, value in stock_twin(dense).state_dict().items():
            torch.testing.assert_close(merged.state_dict()[name], value, rtol=1e-6, atol=1e-8)
        with torch.no_grad():
            assert_same_logits(merged(**batch).logits, dense(**batch).logits)


@pytest.mark.parametrize("weights", ["uniform", "load"])
def test_experts_are_averaged_by_their_weights(student, weights):
    shares = {0: [0.4, 0.3, 0.2, 0.1], 2: [0.0, 0.0, 0.25, 0.75]}
    before = copy.deepcopy(student.state_dict())
    merged = merge_experts(student, weights=weights, loads=shares if weights == "load" else None)
    for layer in (0, 2):
        packed = student.model.language_model.layers[layer].mlp.experts
        mlp = merged.model.language_model.layers[layer].mlp
        share = shares[layer] if weights == "load" else [0.25] * 4
        size = packed.down_proj.shape[-1]
        gate = sum(w * packed.gate_up_proj[e, :size].double() for e, w in enumerate(share))
        up = sum(w * packed.gate_up_proj[e, size:].double() for e, w in enumerate(share))
        down = sum(w * packed.down_proj[e].double() for e, w in enumerate(share))
        for projection, expected in ((mlp.gate_proj, gate), (mlp.up_proj, up), (mlp.down_proj, down)):
            torch.testing.assert_close(projection.weight.double(), expected, rtol=0, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not {value.data_ptr() for value in student.parameters()} & {v.data_ptr() for v in merged.parameters()}


def test_experts_with_biases_are_merged(make_student, batch):
    dense = sharpen(make_student(moe_layers=[], text_model_type="phi"))
    torch.nn.init.zeros_(dense.lm_head.bias)
    sparse = upcycle(dense, layers="all")
    with torch.no_grad():
        assert_same_logits(merge_experts(sparse)(**batch).logits, dense(**batch).logits)


def test_low_rank_experts_are_whole_ones(make_student):
    student = retyped(make_student, "llama", expert_rank=3)
    experts = student.model.language_model.layers[0].mlp.experts
    weights = expert_weights(experts)
    x = torch.randn(7, 32)
    for expert in range(4):
        choice = torch.full((7, 1), expert)
        found = experts(x, choice, torch.ones(7, 1))
        gate, up = (x @ weights[f"{part}_proj.weight"][expert].T for part in ("gate", "up"))
        expected = (torch.nn.functional.silu(gate) * up) @ weights["down_proj.weight"][expert].T
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Exact


CASES = [
    ("qwen3", [0, 2], {"head_dim": 32}, "qwen3_moe"),
    ("qwen3", [0, 1, 2], {"tie_word_embeddings": False}, "qwen3_moe"),
    ("qwen2", [0, 2], {}, "qwen2_moe"),
    ("llama", [1], {"num_key_value_heads": 1}, "qwen2_moe"),
    ("llama", [0, 1, 2], {"head_dim": 8}, "mixtral"),
    ("mistral", [0, 1, 2], {"sliding_window": None}, "mixtral"),
    ("mistral", [0], {"sliding_window": None, "head_dim": 8}, "qwen2_moe"),
]


@pytest.mark.parametrize(("kind", "layers", "fields", "target"), CASES)
def test_the_stock_mixture_of_experts_computes_the_same(make_student, batch, tmp_path, kind, layers, fields, target):
    student = retyped(make_student, kind, moe_layers=layers, **fields)
    for name, parameter in student.named_parameters():
        if "self_attn" in name and name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # zero at first: leaving them out would not show
    stock = export_stock(student)
    assert stock.config.text_config.model_type == target
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)  # no remote code
    assert type(loaded) is LlavaForConditionalGeneration
    (causal,) = loaded.config.text_config.architectures  # by which vLLM's LLaVA finds its language model
    assert getattr(transformers, causal).config_class is type(loaded.config.text_config)
    with torch.no_grad():
        expected = student(**batch).logits
        assert_same_logits(stock(**batch).logits, expected)
        assert_same_logits(loaded(**batch).logits, expected)
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("gemma2", {}, "of the family gemma2"),
        ("llama", {"attention_bias": True}, "has biases"),
        ("llama", {"mlp_bias": True}, "has biases"),
        ("mistral", {"sliding_window": 8}, "sliding attention"),
        ("qwen2", {"use_residual": True}, "dense FFN beside its experts"),
    ],
)
def test_what_has_no_counterpart_is_refused(make_student, kind, fields, message):
    with pytest.raises(ValueError, match=message):
        export_stock(retyped(make_student, kind, **fields))


def test_a_bias_of_the_routers_is_refused_and_one_of_nothing_is_left_out(make_student, batch):
    student = retyped(make_student, "llama")
    with torch.no_grad():
        expected = student(**batch).logits
        add_router_bias(student)
        assert_same_logits(export_stock(student)(**batch).logits, expected)
        router_biases(student)[1][2] = 0.1
    with pytest.raises(ValueError, match="chooses experts by a bias of its routers .* make it dense with"):
        export_stock(student)
    text_config = merge_experts(student).config.text_config
    assert not hasattr(text_config, "router_bias") and not hasattr(text_config, "num_experts")


def test_logits_that_stock_llava_would_change_are_refused(make_student):
    with pytest.raises(ValueError, match="`gemma2` scales, caps or shifts its logits"):
        merge_experts(retyped(make_student, "gemma2"))
    phi = retyped(make_student, "phi")
    torch.nn.init.ones_(phi.lm_head.bias)
    with pytest.raises(ValueError, match="`phi` scales, caps or shifts its logits"):
        merge_experts(phi)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": "median"}, "`weights` is 'median': give one of uniform, load"),
        ({"weights": "load"}, "the one needs the other"),
        ({"loads": {0: [1, 0, 0, 0]}}, "the one needs the other"),
        (
            {"weights": "load", "loads": {0: [1, 0, 0, 0]}},
            r"give 4 shares that sum to 1 for each of the layers \[0, 2\]",
        ),
        ({"weights": "load", "loads": {0: [0.5, 0.5], 2: [0.5, 0.5]}}, "give 4 shares"),
        ({"weights": "load", "loads": {0: [1, 1, 0, 0], 2: [1, 0, 0, 0]}}, "sum to 1"),
    ],
)
def test_bad_input(student, kwargs, message):
    with pytest.raises(ValueError, match=message):
        merge_experts(student, **kwargs)


def test_a_dense_student_and_a_residual_one_are_refused(make_student):
    dense = make_student(moe_layers=[])
    for function in (merge_experts, export_stock):
        with pytest.raises(ValueError, match="it is dense already"):
            function(dense)
    with pytest.raises(ValueError, match="there is no average"):
        merge_experts(retyped(make_student, "llama", use_residual=True))


def test_the_command(student, processor, batch, tmp_path, capsys):
    student.save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    loads = {0: [0.7, 0.1, 0.1, 0.1], 2: [0.25] * 4}
    (tmp_path / "results.json").write_text(json.dumps({"expert_load": loads}))
    expected = {
        "stock": student,
        "uniform": merge_experts(student),
        "load": merge_experts(student, weights="load", loads=loads),
    }
    for form, model in expected.items():
        argv = ["export", "--model", str(tmp_path / "student"), "--output_dir", str(tmp_path / form), "--form", form]
        argv += ["--results", str(tmp_path / "results.json")] if form == "load" else []
        assert main(argv) == 0, capsys.readouterr().err
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / form)
        assert (tmp_path / form / "processor_config.json").is_file()
        with torch.no_grad():
            assert_same_logits(loaded(**batch).logits, model(**batch).logits)
    argv[argv.index("--output_dir") + 1] = str(tmp_path / "other")
    assert main([*argv[:-2]]) == 2
    assert "`--results`" in capsys.readouterr().err
