"""What is logged of the routers is what an independent count of the steps' tokens gives."""

import math

import pytest
import torch

from helpers.ddp_gradients import sharpened
from helpers.stages import StopsAt
from helpers.trainers import TRAINERS
from llava_mod_hf.training.run_lines import add_lines, read_lines

STEPS = {"batch": 1, "accumulation": 2, "max_steps": 4, "logging_steps": 2, "learning_rate": 0.0}
LAYERS = (0, 2)


@pytest.fixture
def trainer_of(make_student, processor, tmp_path):
    """`trainer_of(name, **options)`: a trainer of a sparse student, whose last expert of layer 2 nobody chooses."""

    def make(name, moe_layers=LAYERS, **args):
        student, teacher = (sharpened(make_student(moe_layers=layers, seed=0)) for layers in (moe_layers, []))
        for layer in moe_layers:
            gate = student.model.language_model.layers[layer].mlp.gate.weight.data
            gate.normal_(std=0.4, generator=torch.Generator().manual_seed(layer))
        return TRAINERS[name](student, teacher, processor, tmp_path, **{**STEPS, "router_aux_loss_coef": 0.1, **args})

    return make


def counted(trainer, rows):
    """Per layer, token by token in float64 and without padding: choices by modality and expert, entropies, tokens."""
    batch = trainer.data_collator([trainer.train_dataset[index] for index in rows])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        # of pairs the one image is of both rows
        images = len(inputs["input_ids"]) // len(inputs["pixel_values"])
        inputs["pixel_values"] = inputs["pixel_values"].repeat(images, 1, 1, 1)
        logits = trainer.model(**inputs, output_router_logits=True).router_logits
    real = inputs["attention_mask"].flatten().tolist()
    answers = batch["completion_mask"] if "completion_mask" in batch else batch["labels"] != -100
    names = [
        "picture" if token == trainer.model.config.image_token_index else "answer" if answer else "prompt"
        for token, answer in zip(inputs["input_ids"].flatten().tolist(), answers.flatten().tolist(), strict=True)
    ]
    found = []
    for layer in logits:
        choices, entropies = {name: [0] * 4 for name in ("picture", "prompt", "answer")}, []
        for token, counts, name in zip(layer.double(), real, names, strict=True):
            if not counts:
                continue
            p = [math.exp(value) for value in token.tolist()]
            p = [value / sum(p) for value in p]
            for expert in sorted(range(4), key=lambda expert, p=p: -p[expert])[:2]:
                choices[name][expert] += 1
            entropies.append(-sum(value * math.log(value) for value in p))
        found.append((choices, sum(entropies), len(entropies)))
    return found


def expected_of(trainer, batches):
    """The figures of each layer over several micro-batches."""
    found = [counted(trainer, rows) for rows in batches]
    layers = []
    for parts in zip(*found, strict=True):
        by_modality = {
            name: [sum(column) for column in zip(*(part[0][name] for part in parts), strict=True)]
            for name in ("picture", "prompt", "answer")
        }
        choices = [sum(column) for column in zip(*by_modality.values(), strict=True)]
        entropy, tokens = (sum(part[i] for part in parts) for i in (1, 2))
        load = [count / sum(choices) for count in choices]
        layers.append(
            {
                "load": load,
                "max_load": max(load),
                "load_entropy": -sum(share * math.log(share, 4) for share in load if share),
                "entropy": entropy / tokens / math.log(4),
                "dead_experts": sum(count == 0 for count in choices) / 4,
                "overloaded_experts": sum(share > 0.375 for share in load) / 4,
                "load_by_modality": {
                    name: [count / sum(counts) for count in counts] for name, counts in by_modality.items()
                },
            }
        )
    return layers, tokens


@pytest.mark.parametrize("name", TRAINERS)
def test_figures_are_those_of_a_count_over_all_micro_batches_since_the_last_log(trainer_of, tmp_path, name):
    trainer = trainer_of(name, batch=2)  # of four rows: two micro-batches a step, two steps a log
    trainer.train()
    logs = [logs for logs in trainer.state.log_history if "loss" in logs]
    layers, tokens = expected_of(trainer, [(0, 1), (2, 3)])
    lines = read_lines(tmp_path / "router.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    for log, line in zip(logs, lines, strict=True):
        assert line["tokens"] == 2 * tokens
        assert list(line["layers"]) == ["0", "2"]
        for found, expected in zip(line["layers"].values(), layers, strict=True):
            assert found.pop("load_by_modality") == {
                key: pytest.approx(value, rel=1e-9) for key, value in expected["load_by_modality"].items()
            }
            assert found == {
                key: pytest.approx(expected[key], rel=1e-5) for key in expected.keys() - {"load_by_modality"}
            }
        for key in ("entropy", "load_entropy", "dead_experts", "overloaded_experts"):
            assert log[f"router/{key}"] == pytest.approx((layers[0][key] + layers[1][key]) / 2, rel=1e-5)
        assert log["router/max_load"] == pytest.approx(max(layer["max_load"] for layer in layers), rel=1e-9)
        assert sum(key.startswith("router/") for key in log) == 5


def test_padding_is_left_out_and_evaluations_are_not_counted(trainer_of, tmp_path):
    trainer = trainer_of("mimic", batch=4, accumulation=1, max_steps=1, logging_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    assert not batch["attention_mask"].all()
    trainer.evaluate(trainer.train_dataset)
    trainer.train()
    (line,) = read_lines(tmp_path / "router.jsonl")
    assert line["tokens"] == int(batch["attention_mask"].sum())


def test_each_log_counts_anew(trainer_of, tmp_path):
    trainer = trainer_of("mimic", accumulation=1, max_steps=4, logging_steps=1)
    trainer.train()
    lines = read_lines(tmp_path / "router.jsonl")
    for row, line in enumerate(lines):
        layers, tokens = expected_of(trainer, [(row,)])
        assert line["tokens"] == tokens
        assert [layer["load"] for layer in line["layers"].values()] == [layer["load"] for layer in layers]
    assert len({str(line["layers"]) for line in lines}) > 1


@pytest.mark.parametrize(
    "args",
    [{"moe_layers": [], "router_aux_loss_coef": None}, {"router_aux_loss_coef": 0.0}],
    ids=["dense", "no router loss"],
)
def test_without_router_logits_nothing_is_logged(trainer_of, tmp_path, args):
    trainer = trainer_of("mimic", **args)
    trainer.train()
    assert not [key for key in trainer.state.log_history[0] if key.startswith("router/")]
    assert not (tmp_path / "router.jsonl").exists()


def test_a_collapse_is_told_once(trainer_of, tmp_path, caplog):
    trainer = trainer_of("mimic", accumulation=1, max_steps=2, logging_steps=1)
    gate = trainer.model.model.language_model.layers[2].mlp.gate
    gate.weight.data.zero_()  # of equal logits the same experts are taken
    trainer.train()
    (told,) = [record.getMessage() for record in caplog.records if "the routers of layers" in record.getMessage()]
    assert told.startswith("At step 1 the routers of layers 2 send all tokens to the same 2 of their experts")
    for line in read_lines(tmp_path / "router.jsonl"):
        assert sorted(line["layers"]["2"]["load"]) == [0.0, 0.0, 0.5, 0.5]
        assert line["layers"]["2"]["dead_experts"] == 0.5


def test_a_run_begins_its_files_anew_and_a_resumed_one_goes_on(trainer_of, tmp_path):
    path, examples = tmp_path / "router.jsonl", tmp_path / "examples.jsonl"
    for file in (path, examples):
        add_lines(file, [{"step": 1, "layers": {}}, {"step": 9, "layers": {}}])
    options = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(InterruptedError):
        trainer_of("mimic", callbacks=[StopsAt(4)], **options).train()
    first = read_lines(path)
    assert not examples.exists()
    assert [line["step"] for line in first] == [1, 2, 3]
    with path.open("a") as file:
        file.write('{"step": 4, "la')  # killed while it was written
    trainer_of("mimic", **options).train(resume_from_checkpoint=True)
    lines = read_lines(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[:2] == first[:2]
