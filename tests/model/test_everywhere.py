"""The student where transformers' models go: caches, compilation, checkpointing, attention, padding, devices, files."""

import inspect
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from helpers.models import IMAGE_TOKEN, assert_same_logits, image_inputs, make_dense, moe_blocks
from llava_mod_hf import LlavaModConfig, LlavaModForConditionalGeneration, upcycle
from llava_mod_hf.loading import load_whole

LANGUAGE_MODEL = ("embed_tokens", "rotary_emb", "norm", "layers.0")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE_TOKEN]}


def shaken(student, seed=1):
    """Experts and routers that differ, as after a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".mlp." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return student


@pytest.fixture(scope="module")
def student():
    return shaken(upcycle(make_dense("qwen2"), layers="all"))


@pytest.fixture(scope="module")
def inputs():
    return image_inputs(rows=2)


@pytest.fixture(scope="module")
def logits(student, inputs):
    with torch.no_grad():
        return student(**inputs).logits


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    student.save_pretrained(folder)
    return folder


# Attention, caches, generation


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(folder, inputs, logits, attention):
    loaded = LlavaModForConditionalGeneration.from_pretrained(folder, attn_implementation=attention)
    assert loaded.model.language_model.config._attn_implementation == attention
    assert_same_logits(loaded(**inputs).logits, logits)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_agrees(folder, inputs, logits):
    loaded = LlavaModForConditionalGeneration.from_pretrained(
        folder, attn_implementation={"text_config": "flex_attention", "vision_config": "eager"}
    )
    assert loaded.model.language_model.config._attn_implementation == "flex_attention"
    assert_same_logits(loaded(**inputs).logits, logits)


@torch.no_grad()
def test_a_static_cache_generates_the_same(student, inputs):
    expected = student.generate(**inputs, **GREEDY)
    assert torch.equal(student.generate(**inputs, **GREEDY, cache_implementation="static"), expected)


@torch.no_grad()
def test_one_beam_of_several_is_no_worse_than_greedy(student, inputs):
    beams = {**GREEDY, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    found = student.generate(**inputs, **beams)
    assert found.sequences.shape == (2, inputs["input_ids"].shape[1] + 6)

    def score(sequences):
        logits = student(**{**inputs, "input_ids": sequences}).logits
        log_probs = logits.log_softmax(-1)  # tokens are suppressed after the softmax
        start = inputs["input_ids"].shape[1]
        return log_probs[:, start - 1 : -1].gather(-1, sequences[:, start:, None]).sum((1, 2))

    greedy = student.generate(**inputs, **GREEDY)
    torch.testing.assert_close(score(found.sequences) / 6, found.sequences_scores, rtol=0, atol=1e-4)
    assert (score(found.sequences) >= score(greedy) - 1e-4).all()


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_several_images_and_none_in_one_batch(student, padding_side):
    two, none = image_inputs(rows=2, seed=3), image_inputs(seed=4)["input_ids"] % 80
    two_ids = two["input_ids"].reshape(1, -1)  # two images in one row
    padding = torch.zeros(1, two_ids.shape[1] - none.shape[1], dtype=torch.long)
    row = torch.cat([padding, none] if padding_side == "left" else [none, padding], dim=1)
    input_ids = torch.cat([two_ids, row])
    attention_mask = torch.cat([torch.ones_like(two_ids), (row != 0).long()])
    found = student(input_ids=input_ids, pixel_values=two["pixel_values"], attention_mask=attention_mask).logits
    assert_same_logits(found[0], student(two_ids, pixel_values=two["pixel_values"]).logits[0])
    assert_same_logits(found[1][attention_mask[1].bool()], student(none).logits[0])
    swapped = student(two_ids, pixel_values=two["pixel_values"].flip(0)).logits[0]
    assert (swapped - found[0]).abs().max() > 1e-2  # which image stands where does matter


# Training


def gradients_with(student, inputs, kwargs=None):
    student = shaken(upcycle(make_dense("qwen2"), layers="all")).train()
    if kwargs is not None:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        assert student.model.language_model.is_gradient_checkpointing
    student.config.router_aux_loss_coef = 1.0
    student(**inputs, labels=inputs["input_ids"], output_router_logits=True).loss.backward()
    return {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}


def test_gradient_checkpointing_keeps_every_gradient(student, inputs):
    expected = gradients_with(student, inputs)
    found = gradients_with(student, inputs, {"use_reentrant": False})
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * max(1.0, gradient.abs().max().item()))
    assert expected["model.language_model.layers.0.mlp.gate.weight"].abs().max() > 1e-3


def test_reentrant_checkpointing_is_refused_where_it_loses_the_router_losses(student, inputs):
    with pytest.raises(ValueError, match="Reentrant gradient checkpointing runs the routers without a gradient"):
        gradients_with(student, inputs, {"use_reentrant": True})
    other = shaken(upcycle(make_dense("qwen2"), layers="all")).train()
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    other(**inputs, labels=inputs["input_ids"]).loss.backward()  # nothing to lose
    assert other.get_parameter("model.language_model.layers.0.mlp.experts.down_proj").grad.abs().max() > 0
    with torch.no_grad():
        assert len(other(**inputs, output_router_logits=True).router_logits) == 2


def test_a_trainer_resumes_with_the_experts_of_its_checkpoint(student, inputs, tmp_path):
    """The Trainer resumes by `load_state_dict` from a file in which every expert has its own tensors."""
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(2)]
    for row in rows:
        row["labels"] = row["input_ids"]

    def collate(rows):
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return batch

    def trainer(output_dir):
        args = TrainingArguments(
            output_dir, max_steps=2, save_steps=1, learning_rate=1e-2, report_to="none", use_cpu=True,
            per_device_train_batch_size=2, seed=0, disable_tqdm=True,
        )  # fmt: skip
        model = shaken(upcycle(make_dense("qwen2"), layers="all"))
        return Trainer(model, args, train_dataset=rows, data_collator=collate)

    straight = trainer(tmp_path / "run")
    straight.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert ".experts.0.gate_proj.weight" in " ".join(load_file(tmp_path / "run/checkpoint-1/model.safetensors"))
    expected = straight.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=name)
    start = shaken(upcycle(make_dense("qwen2"), layers="all")).state_dict()
    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    assert (expected[name] - start[name]).abs().max() > 1e-2


# Experts' kernels


@torch.no_grad()
def test_widths_that_grouped_mm_cannot_read_go_through_the_loop(caplog, monkeypatch):
    sizes = {"hidden_size": 30, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 3}
    student = shaken(upcycle(make_dense("llama", **sizes), layers="all"))
    input_ids = image_inputs()["input_ids"] % 80
    student.set_experts_implementation("eager")
    expected = student(input_ids).logits
    student.set_experts_implementation("grouped_mm")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert_same_logits(student(input_ids).logits, expected)
        student(input_ids)
    warned = [record.getMessage() for record in caplog.records if "grouped_mm" in record.getMessage()]
    assert len(warned) == 1
    assert "multiples of 4 in torch.float32, and the experts have 30 and 50" in warned[0]


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["phi", "phi3", "llama"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_every_layout_of_experts_computes_the_same_in_every_kernel(model_type, implementation):
    values = {"mlp_bias": True} if model_type == "llama" else {}
    student = shaken(upcycle(make_dense(model_type, **values), layers="all"))
    assert student.model.language_model.layers[0].mlp.experts.has_bias == (model_type != "phi3")
    inputs = image_inputs()
    student.set_experts_implementation("eager")
    expected = student(**inputs).logits
    student.set_experts_implementation(implementation)
    assert_same_logits(student(**inputs).logits, expected)


@torch.no_grad()
def test_dropless_and_deterministic(student, inputs, logits):
    assert torch.equal(student(**inputs).logits, logits)
    student.train()
    assert_same_logits(student(**inputs).logits, logits)  # no noise in training, and no capacity
    student.eval()
    block = moe_blocks(student)[0]
    block_inputs = torch.randn(1, 9, 32).expand(50, 9, 32)  # all tokens of a kind to the same experts
    output = block(block_inputs)
    assert_same_logits(output, output[:1].expand_as(output))


# Low-rank and residual experts, by hand


def dense_by_hand(mlp, token):
    gate, up = mlp.gate_proj.weight.double() @ token, mlp.up_proj.weight.double() @ token
    return mlp.down_proj.weight.double() @ (gate / (1 + (-gate).exp()) * up)


def low_rank_by_hand(block, token):
    experts, size = block.experts, block.experts.down_a.shape[-1]
    scores = (block.gate.weight.double() @ token).softmax(0)
    weights, chosen = scores.topk(2)
    output = 0
    for weight, expert in zip(weights / weights.sum(), chosen.tolist(), strict=True):
        first = torch.cat([experts.shared.gate_proj.weight, experts.shared.up_proj.weight]).double()
        first = first + experts.up_b[expert].double() @ experts.up_a[expert].double()
        second = (
            experts.shared.down_proj.weight.double() + experts.down_b[expert].double() @ experts.down_a[expert].double()
        )
        gate, up = (first @ token)[:size], (first @ token)[size:]
        output = output + weight * (second @ (gate / (1 + (-gate).exp()) * up))
    return output


@pytest.mark.parametrize("use_residual", [False, True])
def test_low_rank_experts_value_and_gradient_against_an_explicit_sum(use_residual):
    student = shaken(upcycle(make_dense("qwen2"), layers=[0], expert_rank=3, use_residual=use_residual))
    block = moe_blocks(student)[0]
    assert block.experts.up_a.shape == (4, 3, 32)
    tokens = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    found = block(tokens[None])[0]
    expected = torch.stack([low_rank_by_hand(block, token.double()) for token in tokens])
    if use_residual:
        weights = [
            (block.coefficient.weight.double() @ t.double() + block.coefficient.bias.double()).softmax(0)
            for t in tokens
        ]
        dense = [dense_by_hand(block.residual_mlp, token.double()) for token in tokens]
        expected = torch.stack([w[0] * e + w[1] * d for w, e, d in zip(weights, expected, dense, strict=True)])
    assert_same_logits(found.double(), expected)
    parameters = list(block.parameters())
    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((found * probe).sum(), parameters)
    expected = torch.autograd.grad((expected * probe).sum(), parameters)
    for one, other, (name, _) in zip(found, expected, block.named_parameters(), strict=True):
        assert other.abs().max() > 1e-3, name
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * max(1.0, other.abs().max().item()), msg=name)


@torch.no_grad()
@pytest.mark.parametrize("values", [{"expert_rank": 2}, {"use_residual": True}, {"num_experts_per_tok": 4}])
def test_other_kinds_of_experts_round_trip(values, inputs, tmp_path):
    student = shaken(upcycle(make_dense("phi"), **values))
    student.save_pretrained(tmp_path)
    loaded = LlavaModForConditionalGeneration.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in values} == values
    assert_same_logits(loaded(**inputs).logits, student(**inputs).logits)
    if "expert_rank" in values:
        dense = sum(parameter.numel() for parameter in make_dense("phi").parameters())
        assert sum(parameter.numel() for parameter in loaded.parameters()) < 1.1 * dense


# Files


@torch.no_grad()
def test_low_rank_and_whole_experts_are_saved_beside_each_other(inputs, tmp_path):
    """transformers keeps the names in the file by class name: neither kind may take the other's, whatever came last."""
    kinds = {"low": {"expert_rank": 2}, "whole": {}}
    students = {kind: shaken(upcycle(make_dense("qwen2"), **kinds[kind])) for kind in ("low", "whole", "low")}
    for kind in ("whole", "low", "whole"):
        students[kind].save_pretrained(tmp_path / kind)
        loaded = LlavaModForConditionalGeneration.from_pretrained(tmp_path / kind)
        assert_same_logits(loaded(**inputs).logits, students[kind](**inputs).logits)
        apart = [name for name in load_file(tmp_path / kind / "model.safetensors") if ".experts.3.down_proj" in name]
        assert bool(apart) == (kind == "whole")


@torch.no_grad()
def test_packed_in_memory_and_apart_in_the_file(folder, student, inputs, logits):
    stored = load_file(folder / "model.safetensors")
    prefix = "model.language_model.layers.0.mlp.experts"
    packed = student.get_parameter(f"{prefix}.gate_up_proj")
    assert f"{prefix}.gate_up_proj" not in stored
    for expert in range(4):
        names = [f"{prefix}.{expert}.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
        assert torch.equal(torch.cat([stored[names[0]], stored[names[1]]]), packed[expert])
        assert torch.equal(stored[names[2]], student.get_parameter(f"{prefix}.down_proj")[expert])
    # a file with packed tensors, as earlier versions wrote, is read as well
    loaded = LlavaModForConditionalGeneration.from_pretrained(folder)
    assert_same_logits(loaded(**inputs).logits, logits)


@torch.no_grad()
def test_a_file_with_packed_experts_is_read(student, inputs, logits, tmp_path):
    student.save_pretrained(tmp_path, save_original_format=False)
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    assert_same_logits(LlavaModForConditionalGeneration.from_pretrained(tmp_path)(**inputs).logits, logits)


@torch.no_grad()
def test_shards_and_devices(student, inputs, logits, tmp_path):
    student.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    parts = ["vision_tower", "multi_modal_projector", *(f"language_model.{name}" for name in LANGUAGE_MODEL)]
    device_map = {
        "lm_head": "cpu",
        **{f"model.{part}": "cpu" for part in parts},
        "model.language_model.layers.1": "disk",
    }
    for kwargs in (
        {"device_map": "cpu"},
        {"device_map": "auto", "max_memory": {"cpu": "1GB"}},
        {"device_map": device_map, "offload_folder": str(tmp_path / "offload")},
    ):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, **kwargs)
        assert_same_logits(loaded(**inputs).logits, logits)
    assert next(loaded.model.language_model.layers[1].parameters()).is_meta  # it is read when it is its turn
    assert set(loaded._no_split_modules) >= {"Qwen2DecoderLayer"}


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(tied, inputs, tmp_path):
    student = upcycle(make_dense("llama", tie_word_embeddings=tied), layers=[0])
    before = student(**inputs).logits
    student.resize_token_embeddings(110, mean_resizing=False)
    student.save_pretrained(tmp_path)
    loaded = LlavaModForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.shape[0] == loaded.get_input_embeddings().weight.shape[0] == 110
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.config.text_config.vocab_size == 110
    assert_same_logits(loaded(**inputs).logits[..., :96], before)


@pytest.mark.parametrize("verbosity", [logging.WARNING, logging.ERROR])
def test_a_cut_off_file_is_refused(folder, student, tmp_path, monkeypatch, verbosity):
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "level", verbosity)
    logger.manager._clear_cache()
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = load_file(folder / "model.safetensors")
    gone = "model.language_model.layers.1.mlp.experts.3.up_proj.weight"
    norm = "model.language_model.norm.weight"
    save_file({k: v for k, v in stored.items() if k != norm}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"has 1 of the model's weights not at all.*: {norm}"):
        load_whole(AutoModelForImageTextToText, tmp_path)
    save_file({k: v for k, v in stored.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has 1 of.*layers\.1\.mlp\.experts\.gate_up_proj"):
        load_whole(AutoModelForImageTextToText, tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="are cut off or of another model: .*deserializing header"):
        load_whole(AutoModelForImageTextToText, tmp_path)


def test_the_parents_methods_that_are_overridden_are_as_they_were():
    names = list(inspect.signature(torch.nn.Module._load_from_state_dict).parameters)
    assert names[:3] == ["self", "state_dict", "prefix"]


def test_weights_of_another_shape_are_refused(folder):
    config = LlavaModConfig.from_pretrained(folder)
    config.text_config.intermediate_size = 128
    with pytest.raises(ValueError, match=r"in another shape: .*layers\.0\.mlp\.experts\.down_proj"):
        load_whole(LlavaModForConditionalGeneration, folder, config=config)
    loaded = LlavaModForConditionalGeneration.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)
    assert loaded.config.text_config.intermediate_size == 128  # as any model of transformers
