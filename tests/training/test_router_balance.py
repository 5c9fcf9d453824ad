"""Loss-free balancing: a collapse recovers, the biases are those of a plain count, and gradients do not know it."""

import copy

import pytest
import torch
from peft import LoraConfig

from helpers.ddp_gradients import assert_gradients_close, mimic_trainer, raw_gradients
from helpers.models import moe_blocks
from helpers.stages import StopsAt
from llava_mod_hf import LlavaModForConditionalGeneration, MimicConfig
from llava_mod_hf.students.router_bias import router_biases
from llava_mod_hf.training.run_lines import read_lines

LABELS = {"kl_weight": 0.0, "lm_weight": 1.0, "temperature": 1.0}


@pytest.fixture
def student(make_student):
    """Its last expert of layer 2 is hardly chosen."""
    student = make_student(seed=0)
    for place, block in enumerate(moe_blocks(student)):
        block.gate.weight.data.normal_(std=0.4, generator=torch.Generator().manual_seed(place))
    return student


@pytest.fixture
def trainer_of(student, processor, tmp_path):
    def make(name="run", model=None, **args):
        model = copy.deepcopy(student) if model is None else model
        return mimic_trainer(model, None, processor, tmp_path / name, **{**LABELS, **args})

    return make


def collapsed(make_student):
    """A student of top-1 routing whose first expert gets every token, or 99 in 100."""
    student = make_student()
    student.config.num_experts_per_tok = 1
    common = torch.randn(32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        student.get_input_embeddings().weight += 0.01 * common  # what all hidden states have in common
        student.model.multi_modal_projector.linear_2.bias += 0.01 * common
        for place, block in enumerate(moe_blocks(student)):
            block.gate.top_k = 1
            block.gate.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(2 * place))
            block.gate.weight[0] = 3 * common / common.norm() / 32**0.5
    return student


@pytest.mark.slow
def test_a_forced_collapse_is_told_and_recovers_with_the_option_alone(make_student, trainer_of, tmp_path, caplog):
    entropies = {}
    for rate in (0.0, 0.02):
        trainer = trainer_of(
            f"rate {rate}",
            collapsed(make_student),
            router_bias_update=rate,
            router_aux_loss_coef=0.0 if rate else 1e-9,
            learning_rate=1e-5,
            max_steps=25,
        )
        trainer.train()
        lines = read_lines(tmp_path / f"rate {rate}" / "router.jsonl")
        entropies[rate] = [[figures["load_entropy"] for figures in line["layers"].values()] for line in lines]
    told = [record.getMessage() for record in caplog.records if "the routers of layers" in record.getMessage()]
    assert len(told) == 2 and "layers 0, 2 send all tokens to the same 1 of their experts" in told[0]
    assert max(max(layers) for layers in (*entropies[0.0], entropies[0.02][0])) < 0.05
    for layer in (0, 1):
        assert sum(layers[layer] for layers in entropies[0.02][15:]) / 10 > 0.7


def test_biases_are_those_of_a_plain_count_over_accumulation_steps(trainer_of):
    trainer = trainer_of(batch=1, accumulation=4, max_steps=3, learning_rate=0.0, router_bias_update=0.03)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        logits = trainer.model(**inputs, output_router_logits=True).router_logits
    real = inputs["attention_mask"].flatten().bool()
    for _ in range(3):
        for layer, values in enumerate(logits):  # the first layer's alone do not depend on the biases
            if layer:
                break
            scores = values[real].double().softmax(-1) + expected[layer]
            chosen = [sorted(range(4), key=lambda expert, row=row: -row[expert])[:2] for row in scores.tolist()]
            counts = [sum(expert in each for each in chosen) for expert in range(4)]
            mean = sum(counts) / 4
            expected[layer] += 0.03 * torch.tensor([(count < mean) - (count > mean) for count in counts])
    trainer.train()
    first, second = router_biases(trainer.model)
    assert first.dtype == torch.float32 and set(expected[0].tolist()) != {0.0}
    torch.testing.assert_close(first.double(), expected[0], rtol=0, atol=1e-7)
    assert second.any()


def test_gradients_are_those_without_it(trainer_of, student):
    options = {"router_aux_loss_coef": 0.1, "batch": 2, "accumulation": 2}
    plain = raw_gradients(trainer_of("plain", **options))
    trainer = trainer_of("balanced", router_bias_update=0.5, **options)
    found = raw_gradients(trainer)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)  # of the first step, whose biases are 0
    assert all(bias.abs().max() == 0.5 for bias in router_biases(trainer.model))
    biased = copy.deepcopy(trainer.model)  # a rate of 0 leaves a student its biases
    kept = [bias.clone() for bias in router_biases(biased)]
    again = trainer_of("kept", biased, router_bias_update=0.0, **options)
    assert_gradients_differ(raw_gradients(again), plain)
    assert all(torch.equal(bias, other) for bias, other in zip(router_biases(again.model), kept, strict=True))


def assert_gradients_differ(found, plain):
    with pytest.raises(AssertionError):
        assert_gradients_close(found, plain)


def test_neither_weight_decay_nor_the_optimiser_touches_a_bias(trainer_of):
    trainer = trainer_of(router_bias_update=0.01, weight_decay=0.5, learning_rate=0.1, max_steps=2)
    trainer.train()
    for bias in router_biases(trainer.model):
        steps = bias / 0.01
        assert (steps - steps.round()).abs().max() < 1e-3 and steps.abs().max() <= 2 and bias.any()


def test_a_resumed_run_ends_with_the_same_bits(trainer_of, tmp_path):
    options = {
        "router_bias_update": 0.01,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "constant",
    }
    whole = trainer_of("whole", **options)
    whole.train()
    with pytest.raises(InterruptedError):
        trainer_of("cut", callbacks=[StopsAt(3)], **options).train()
    cut = trainer_of("cut", **options)
    cut.train(resume_from_checkpoint=True)
    expected = whole.model.state_dict()
    assert sum("e_score_correction_bias" in name for name in expected) == 2
    assert all(torch.equal(value, expected[name]) for name, value in cut.model.state_dict().items())
    saved = LlavaModForConditionalGeneration.from_pretrained(tmp_path / "cut" / "checkpoint-4")
    for found, bias in zip(router_biases(saved), router_biases(whole.model), strict=True):
        assert bias.any() and torch.equal(found, bias)


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(tmp_path, rate):
    with pytest.raises(ValueError, match="`router_bias_update` is .*: give a number of 0 or more"):
        MimicConfig(str(tmp_path), use_cpu=True, bf16=False, router_bias_update=rate)


def test_what_would_not_be_saved_or_moved_is_refused(trainer_of, make_student, tmp_path):
    with pytest.raises(ValueError, match="an adapter is trained, whose file holds no routers' biases"):
        MimicConfig(str(tmp_path), use_cpu=True, bf16=False, router_bias_update=0.1, use_peft=True)
    with pytest.raises(ValueError, match="an adapter is trained, whose file holds no routers' biases"):
        trainer_of(router_bias_update=0.1, peft_config=LoraConfig(target_modules=["q_proj"]), train_modules=None)
    with pytest.raises(ValueError, match="has no routers whose bias could be moved"):
        trainer_of(model=make_student(moe_layers=[]), router_bias_update=0.1, router_aux_loss_coef=None)
    with pytest.raises(ValueError, match="`gumbel_second_expert` chooses by the probabilities alone"):
        trainer_of(router_bias_update=0.1, reference_compat=["gumbel_second_expert"])
