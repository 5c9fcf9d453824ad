import pytest
import torch
from PIL import Image

from llava_mod_hf.evaluation.expert_load import (
    choices_of,
    count_choices,
    has_collapsed,
    modalities,
    router_figures,
    sum_entropy,
)
from llava_mod_hf.publishing.figures import plot_expert_load, plot_losses

LOADS = {0: [0.25, 0.4, 0.15, 0.2], 2: [0.1, 0.2, 0.3, 0.4]}
HISTORY = {
    "mimic_sparse": [{"step": 10 * i, "loss": 2.0 / i, "epoch": 0.1 * i} for i in range(1, 20)]
    + [{"step": 190, "eval_loss": 9.0}, {"step": 190, "train_runtime": 3.0, "train_loss": 0.5}],
    "prefer": [{"step": 5, "loss": 0.7}],
}


def test_figures_of_a_router_that_uses_one_expert():
    assert router_figures([0, 8, 0, 0], 0.0, 8) == {
        "load": [0.0, 1.0, 0.0, 0.0],
        "max_load": 1.0,
        "load_entropy": 0.0,
        "entropy": 0.0,
        "dead_experts": 0.75,
        "overloaded_experts": 0.25,
    }
    assert router_figures([4], 0.0, 4)["entropy"] == 0.0


def test_an_expert_is_overloaded_beyond_one_and_a_half_times_its_share():
    # of four experts with 16 choices, 6 are just one and a half times an even share
    assert router_figures([6, 6, 2, 2], 1.0, 8)["overloaded_experts"] == 0.0
    assert router_figures([7, 7, 1, 1], 1.0, 8)["overloaded_experts"] == 0.5


@pytest.mark.parametrize(
    ("load", "top_k", "expected"),
    [
        ([0.0, 1.0, 0.0, 0.0], 1, True),
        ([0.5, 0.0, 0.5, 0.0], 2, True),
        ([0.5, 0.25, 0.25, 0.0], 2, False),  # every token has the first expert, and the second varies
        ([0.5, 0.0, 0.496, 0.004], 2, True),
        ([0.5, 0.0, 0.48, 0.02], 2, False),
        ([0.5, 0.5], 2, False),  # there is nothing to choose
    ],
)
def test_a_router_has_collapsed_if_its_choice_is_always_the_same(load, top_k, expected):
    assert has_collapsed(load, top_k) is expected


def test_tokens_are_told_apart_by_what_they_are():
    ids = torch.tensor([[7, 7, 1, 2, 3], [4, 1, 2, 0, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    answers = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]).bool()
    assert modalities(ids, mask, answers, 7).tolist() == [0, 0, 1, 2, 2, 1, 1, 2, 3, 3]


def test_choices_and_entropies_are_counted_group_by_group():
    logits = [torch.randn(9, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    groups = torch.tensor([0, 1, 2, 0, 0, 2, 1, 2, 0])  # the last does not count
    choices = count_choices(choices_of(logits, 2, [None, None]), 4, groups, 2)
    entropy = sum_entropy(logits, groups, 2)
    for layer, values in enumerate(logits):
        for group in range(2):
            mine = [row for row, other in zip(values.tolist(), groups.tolist(), strict=True) if other == group]
            chosen = [
                expert for row in mine for expert in sorted(range(4), key=lambda expert, row=row: -row[expert])[:2]
            ]
            assert choices[layer, group].tolist() == [chosen.count(expert) for expert in range(4)]
            probabilities = torch.tensor(mine, dtype=torch.float64).softmax(-1)
            expected = -(probabilities * probabilities.log()).sum()
            assert entropy[layer, group].item() == pytest.approx(expected.item(), rel=1e-6)


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
