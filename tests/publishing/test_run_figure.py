"""The picture of runs shows each figure once, and the load of every expert at every log."""

import math

import numpy as np

from llava_mod_hf.publishing.run_figure import draw_runs, load_map, panels

CURVES = {
    "a": {"loss": [(1, 3.0), (2, 2.0), (3, 1.0)], "eval_loss": [(3, 1.5)], "kl": [(1, 0.2)], "num_tokens": [(1, 9.0)]},
    "b": {"loss": [(1, 4.0)], "eval_exact_match": [(3, 0.5)], "eval_runtime": [(3, 9.0)], "train_loss": [(3, 2.0)]},
}
LINES = [
    {"step": 1, "layers": {"0": {"load": [0.5, 0.5]}, "2": {"load": [0.25, 0.75]}}},
    {"step": 5, "layers": {"0": {"load": [1.0, 0.0]}, "2": {"load": [0.5, 0.5]}}},
]


def test_a_figure_and_that_of_evaluations_share_a_panel_and_costs_have_none():
    assert list(panels(CURVES).items()) == [
        ("loss", ["loss", "eval_loss"]),
        ("kl", ["kl"]),
        ("exact_match", ["eval_exact_match"]),
    ]


def test_curves_are_what_was_logged(drawn, tmp_path):
    draw_runs(CURVES, {"a": LINES, "b": []}, tmp_path / "report.png")
    loss, kl, match, load, _ = drawn[0].axes  # and its colour bar
    titles = [axes.get_title() for axes in (loss, kl, match)]
    assert titles == ["loss (dashed: evaluation)", "kl", "exact_match (evaluation)"]
    found = [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle()) for line in loss.lines]
    drawn_lines = [([1, 2, 3], [3.0, 2.0, 1.0], "-"), ([3], [1.5], "--"), ([1], [4.0], "-")]
    assert [line for line in found if line[0]] == drawn_lines
    colors = {line.get_color() for line in loss.lines if len(line.get_xdata())}
    assert len(colors) == 2
    assert {line.get_marker() for line in loss.lines if len(line.get_xdata()) == 1} == {"o"}
    assert load.get_title() == "a: load of each expert (1: even, 0: dead)"
    assert np.array_equal(load.images[0].get_array(), [[1.0, 2.0], [1.0, 0.0], [0.5, 1.0], [1.5, 1.0]])
    assert [label.get_text() for label in load.get_yticklabels()] == ["layer 0", "layer 2"]
    assert [label.get_text() for label in load.get_xticklabels()] == ["1", "5"]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b"]


def test_a_line_without_a_layer_leaves_a_gap():
    rows = load_map([{"step": 1, "layers": {}}, LINES[1]])
    assert [math.isnan(row[0]) for row in rows] == [True] * 4
    assert [row[1] for row in rows] == [2.0, 0.0, 1.0, 1.0]


def test_the_same_runs_give_the_same_bytes(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        draw_runs(CURVES, {"a": LINES, "b": []}, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
