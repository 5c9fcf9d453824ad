from collections import Counter

import pytest
import torch
from PIL import Image

from llava_mod_hf.data import easy_vqa
from llava_mod_hf.evaluation.expert_load import expert_load, expert_load_by_modality
from llava_mod_hf.model.moe_llava_mod import LlavaModExperts
from llava_mod_hf.publishing.figures import plot_expert_load, plot_losses

LOADS = {0: [0.25, 0.4, 0.15, 0.2], 2: [0.1, 0.2, 0.3, 0.4]}
HISTORY = {
    "mimic_sparse": [{"step": 10 * i, "loss": 2.0 / i, "epoch": 0.1 * i} for i in range(1, 20)]
    + [{"step": 190, "eval_loss": 9.0}, {"step": 190, "train_runtime": 3.0, "train_loss": 0.5}],
    "prefer": [{"step": 5, "loss": 0.7}],
}


@pytest.fixture(scope="module")
def dataset():
    return easy_vqa.load("mixture", "test").select(range(16))


@pytest.fixture(scope="module")
def student(make_student):
    return make_student(moe_layers=[0, 2])


@pytest.fixture(scope="module")
def counts(student, processor, dataset):
    """What the experts are really given, row by row and without padding: `{(layer, is image, expert): choices}`."""
    counts, is_image = Counter(), []
    layers = {
        module: index
        for index, layer in enumerate(student.model.language_model.layers)
        for module in layer.mlp.modules()
        if isinstance(module, LlavaModExperts)
    }

    def record(module, args):
        _, top_k_index, _ = args
        for image, chosen in zip(is_image, top_k_index.tolist(), strict=True):
            counts.update((layers[module], image, expert) for expert in chosen)

    hooks = [module.register_forward_pre_hook(record) for module in layers]
    for row in dataset:
        text = f"<|user|><image>{row['question']}<|assistant|>{row['answer']}<|end|>"
        inputs = processor(text=text, images=row["images"], return_tensors="pt")
        is_image[:] = [token == student.config.image_token_index for token in inputs["input_ids"][0].tolist()]
        with torch.no_grad():
            student(**inputs)
    for hook in hooks:
        hook.remove()
    return counts


def shares(counts, layer, modalities):
    chosen = [sum(counts[layer, image, expert] for image in modalities) for expert in range(4)]
    return pytest.approx([count / sum(chosen) for count in chosen], abs=1e-12)


@pytest.mark.parametrize("batch_size", [3, 16])
def test_load_equals_a_count_of_what_the_experts_are_given(student, processor, dataset, counts, batch_size):
    loads = expert_load(student, processor, dataset, batch_size=batch_size)
    assert list(loads) == [0, 2]
    for layer in loads:
        assert loads[layer] == shares(counts, layer, [False, True])
        assert sum(loads[layer]) == pytest.approx(1.0)


def test_load_by_modality_equals_a_count(student, processor, dataset, counts):
    loads = expert_load_by_modality(student, processor, dataset)
    assert list(loads) == ["text", "image"]
    for layer in (0, 2):
        assert loads["text"][layer] == shares(counts, layer, [False])
        assert loads["image"][layer] == shares(counts, layer, [True])


def test_a_modality_without_tokens_is_left_out(student, processor, dataset):
    rows = dataset.remove_columns("images").add_column("images", [[]] * len(dataset))
    assert list(expert_load_by_modality(student, processor, rows)) == ["text"]


def test_dense_models_have_no_load(make_student, processor, dataset):
    dense = make_student(moe_layers=[])
    assert expert_load(dense, processor, dataset) == expert_load_by_modality(dense, processor, dataset) == {}


@pytest.mark.parametrize("plot, data", [(plot_losses, HISTORY), (plot_expert_load, LOADS)])
def test_figures_are_the_same_bytes_every_time(plot, data, tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        plot(data, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with Image.open(paths[0]) as image:
        assert image.format == "PNG" and image.width > 600 and "Software" not in image.info
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 10  # something is drawn


def test_loss_figure_has_a_panel_of_the_logged_losses_per_stage(drawn, tmp_path):
    plot_losses(HISTORY, tmp_path / "losses.png")
    panels = drawn[0].axes
    assert [axes.get_title() for axes in panels] == ["mimic_sparse", "prefer"]
    line = panels[0].lines[0]
    assert list(line.get_xdata()) == [10 * i for i in range(1, 20)]
    assert list(line.get_ydata()) == [2.0 / i for i in range(1, 20)]
    assert panels[1].lines[0].get_marker() == "o"


def test_load_figure_has_a_bar_per_expert_and_layer(drawn, tmp_path):
    plot_expert_load(LOADS, tmp_path / "load.png")
    (axes,) = drawn[0].axes
    heights = [[bar.get_height() for bar in container] for container in axes.containers]
    assert heights == [[LOADS[0][e], LOADS[2][e]] for e in range(4)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2"]
    assert axes.lines[0].get_ydata()[0] == 0.25


def test_figures_refuse_what_they_cannot_show(tmp_path):
    path = tmp_path / "figure.png"
    with pytest.raises(ValueError, match="No `loss` was logged in adapt"):
        plot_losses({"adapt": [{"step": 3, "train_runtime": 1.0}], "prefer": [{"step": 1, "loss": 1.0}]}, path)
    with pytest.raises(ValueError, match="any stage"):
        plot_losses({}, path)
    with pytest.raises(ValueError, match=r"\[\] have no experts"):
        plot_expert_load({}, path)
    with pytest.raises(ValueError, match=r"\[0, 1\] have \[1, 2\] experts"):
        plot_expert_load({0: [0.5, 0.5], 1: [1.0]}, path)
    assert not path.exists()
