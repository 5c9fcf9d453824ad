"""What is told of a student's routers is what a plain count of its experts' tokens gives, row by row."""

import itertools
import math
from collections import Counter

import pytest
import torch
from datasets import Dataset

from llava_mod_hf import upcycle
from llava_mod_hf.data import easy_vqa
from llava_mod_hf.evaluation import router_use as router_use_module
from llava_mod_hf.evaluation.router_use import expert_distances, loads_of, router_use, sample
from llava_mod_hf.model.moe_llava_mod import LlavaModExperts, LlavaModTopKRouter

LAYERS = [0, 2]
MODALITIES = ["picture", "prompt", "answer"]


@pytest.fixture(scope="module")
def dataset():
    return easy_vqa.load("mixture", "test").select(range(16))


@pytest.fixture(scope="module")
def student(make_student):
    student = make_student(moe_layers=LAYERS)
    with torch.no_grad():
        for layer in LAYERS:
            student.model.language_model.layers[layer].mlp.gate.weight.normal_(std=0.4)
            student.model.language_model.layers[layer].mlp.gate.weight[3].zero_()
    return student


@pytest.fixture(scope="module")
def tokens(student, processor, dataset):
    """Of each token, row by row and without padding: `task`, `modality`, and of each layer its experts and entropy."""
    found, chosen, entropies = [], [], []

    def record_choice(module, args):
        chosen.append(args[1].tolist())

    def record_entropy(module, args, output):
        p = output[0].double().softmax(-1)
        entropies.append((-(p * p.log()).sum(-1)).tolist())

    hooks = [
        module.register_forward_pre_hook(record_choice)
        if isinstance(module, LlavaModExperts)
        else module.register_forward_hook(record_entropy)
        for module in student.modules()
        if isinstance(module, LlavaModExperts | LlavaModTopKRouter)
    ]
    start_of_answer = processor.tokenizer.convert_tokens_to_ids("<|assistant|>")
    for row in dataset:
        text = f"<|user|><image>{row['question']}<|assistant|>{row['answer']}<|end|>"
        inputs = processor(text=text, images=row["images"], return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        modality = ["picture" if token == student.config.image_token_index else "prompt" for token in ids]
        answer = ids.index(start_of_answer) + 1
        modality[answer:] = ["answer"] * (len(ids) - answer)
        chosen.clear(), entropies.clear()
        with torch.no_grad():
            student(**inputs)
        found += [
            {
                "task": row["kind"],
                "modality": modality[place],
                "experts": [layer[place] for layer in chosen],
                "entropy": [layer[place] for layer in entropies],
            }
            for place in range(len(ids))
        ]
    for hook in hooks:
        hook.remove()
    return found


def expected_figures(tokens, place):
    counts = Counter(expert for token in tokens for expert in token["experts"][place])
    load = [counts[expert] / (2 * len(tokens)) for expert in range(4)]
    return {
        "load": pytest.approx(load, abs=1e-12),
        "max_load": pytest.approx(max(load), abs=1e-12),
        "load_entropy": pytest.approx(-sum(share * math.log(share, 4) for share in load if share), abs=1e-9),
        "entropy": pytest.approx(
            sum(token["entropy"][place] for token in tokens) / len(tokens) / math.log(4), rel=1e-5
        ),
        "dead_experts": load.count(0) / 4,
        "overloaded_experts": sum(share > 1.5 / 4 for share in load) / 4,
    }


def of_each(tokens, name):
    return {value: [token for token in tokens if token[name] == value] for value in {token[name] for token in tokens}}


@pytest.mark.parametrize("batch_size", [3, 16])
def test_figures_are_those_of_a_count_of_what_the_experts_are_given(student, processor, dataset, tokens, batch_size):
    found = router_use(student, processor, dataset, tasks=dataset["kind"], batch_size=batch_size)
    assert found["rows"] == 16
    modalities, tasks = of_each(tokens, "modality"), of_each(tokens, "task")
    assert found["tokens"] == {name: len(modalities[name]) for name in MODALITIES}
    assert list(found["layers"]) == LAYERS and len(tasks) > 1
    for place, layer in enumerate(LAYERS):
        figures = found["layers"][layer]
        for name, expected in expected_figures(tokens, place).items():
            assert figures[name] == expected, name
        assert figures["by_modality"] == {name: expected_figures(modalities[name], place) for name in MODALITIES}
        assert figures["by_task"] == {name: expected_figures(tasks[name], place) for name in sorted(tasks)}
    assert loads_of(found) == {layer: found["layers"][layer]["load"] for layer in LAYERS}


def test_experts_that_are_chosen_together_and_paths_are_counted(student, processor, dataset, tokens):
    found = router_use(student, processor, dataset, batch_size=5)
    assert not any("by_task" in figures for figures in found["layers"].values())
    for place, layer in enumerate(LAYERS):
        pairs = Counter(pair for token in tokens for pair in itertools.product(token["experts"][place], repeat=2))
        expected = [[pairs[a, b] / len(tokens) for b in range(4)] for a in range(4)]
        for row, counted in zip(found["layers"][layer]["together"], expected, strict=True):
            assert row == pytest.approx(counted, abs=1e-12)
    paths = Counter(tuple(layer[0] for layer in token["experts"]) for token in tokens)
    for first, row in enumerate(found["layers"][0]["next_layer"]):
        assert row == pytest.approx([paths[first, second] / len(tokens) for second in range(4)], abs=1e-12)
    assert "next_layer" not in found["layers"][2]
    assert found["paths"]["distinct"] == len(paths) > 4
    told = {tuple(path["experts"]): path["share"] * len(tokens) for path in found["paths"]["most_frequent"]}
    assert told == pytest.approx({path: paths[path] for path in told})
    assert sorted(told.values(), reverse=True) == pytest.approx(sorted(paths.values(), reverse=True)[: len(told)])


def test_a_modality_without_tokens_is_left_out(student, processor, dataset):
    rows = dataset.remove_columns("images").add_column("images", [[]] * len(dataset))
    found = router_use(student, processor, rows)
    assert found["tokens"]["picture"] == 0
    assert list(found["layers"][0]["by_modality"]) == ["prompt", "answer"]


def test_a_forced_collapse_is_told(make_student, processor, dataset):
    student = make_student(moe_layers=LAYERS)
    student.model.language_model.layers[2].mlp.gate.weight.data.zero_()  # of equal logits the same experts are taken
    found = router_use(student, processor, dataset)
    assert found["collapsed"] == [2]
    assert found["layers"][2]["dead_experts"] == 0.5


def test_dense_models_have_no_routers(make_student, processor, dataset):
    assert router_use(make_student(moe_layers=[]), processor, dataset) == {}
    assert loads_of({}) == {}


@pytest.mark.parametrize("options", [{}, {"expert_rank": 2}], ids=["whole", "low-rank"])
def test_distances_are_those_of_the_weights_written_out(make_student, options):
    student = upcycle(make_student(moe_layers=[]), layers=[1], num_experts=3, **options)
    mlp = student.model.language_model.layers[1].mlp
    assert expert_distances(mlp.experts) == pytest.approx([0.0] * 3, abs=1e-6)
    with torch.no_grad():
        for parameter in mlp.experts.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    state = {name: value.detach().double() for name, value in mlp.experts.state_dict().items()}
    if options:
        first = torch.cat([state["shared.gate_proj.weight"], state["shared.up_proj.weight"]])
        up = [first + b @ a for a, b in zip(state["up_a"], state["up_b"], strict=True)]
        second = state["shared.down_proj.weight"]
        down = [second + b @ a for a, b in zip(state["down_a"], state["down_b"], strict=True)]
    else:
        up, down = list(state["gate_up_proj"]), list(state["down_proj"])
    experts = [torch.cat([one.flatten(), other.flatten()]) for one, other in zip(up, down, strict=True)]
    mean = sum(experts) / 3
    expected = [((expert - mean).norm() / mean.norm()).item() for expert in experts]
    assert min(expected) > 0.1
    assert expert_distances(mlp.experts) == pytest.approx(expected, rel=1e-5)


def test_rows_are_taken_from_all_over_the_data_set(monkeypatch):
    monkeypatch.setattr(router_use_module, "ROWS", 4)
    assert sample(Dataset.from_dict({"place": range(10)}))["place"] == [0, 2, 5, 7]
    assert len(sample(Dataset.from_dict({"place": range(3)}))) == 3
