"""The picture of routers shows each expert's load by modality and task, its company, what follows, and its distance."""

import numpy as np

from llava_mod_hf.publishing.router_figure import draw_routers, given_rows, load_columns


def figures(load, **more):
    return {"load": load, "by_modality": {"prompt": {"load": load[::-1]}}, **more}


LAYERS = {
    "0": figures(
        [0.75, 0.25], together=[[0.8, 0.2], [0.2, 0.4]], next_layer=[[0.3, 0.3], [0.4, 0.0]], distance=[0.1, 0.3]
    ),
    "2": figures([1.0, 0.0], together=[[1.0, 0.0], [0.0, 0.0]], distance=[0.2, 0.2]),
}
LAYERS["2"]["by_modality"]["picture"] = {"load": [0.5, 0.5]}
LAYERS["0"]["by_task"] = {"color": {"load": [0.5, 0.5]}}
LAYERS["2"]["by_task"] = {}


def test_columns_are_multiples_of_an_even_load_and_gaps_where_there_is_no_token():
    names, rows = load_columns(LAYERS)
    assert names == ["all", "prompt", "picture", "color"]
    nan = float("nan")
    expected = [[1.5, 0.5, nan, 1.0], [0.5, 1.5, nan, 1.0], [2.0, 0.0, 1.0, nan], [0.0, 2.0, 1.0, nan]]
    assert np.array_equal(rows, expected, equal_nan=True)


def test_rows_of_what_follows_are_shares_of_the_tokens_that_were_there():
    rows = given_rows([[[0.3, 0.1], [0.0, 0.0]], None])
    assert np.allclose(rows, [[0.75, 0.25], [0.0, 0.0], [np.nan] * 2, [np.nan] * 2], equal_nan=True)


def test_the_maps_are_what_was_counted(drawn, tmp_path):
    draw_routers({"a": {"layers": LAYERS}}, tmp_path / "routers.png")
    load, together, following, distance = drawn[0].axes[:4]
    assert load.get_title() == "a: load (1: even, 0: dead)"
    assert [label.get_text() for label in load.get_xticklabels()] == ["all", "prompt", "picture", "color"]
    assert [label.get_text() for label in load.get_yticklabels()] == ["layer 0", "layer 2"]
    assert np.allclose(
        load.images[0].get_array().filled(9), [[1.5, 0.5, 9, 1], [0.5, 1.5, 9, 1], [2, 0, 1, 9], [0, 2, 1, 9]]
    )
    # of the tokens that chose the first expert, a quarter chose the second as well
    shares = together.images[0].get_array().filled(9)
    assert np.allclose(shares, [[9, 0.25], [0.5, 9], [9, 0.0], [0.0, 9]])
    assert np.allclose(following.images[0].get_array().filled(9), [[0.5, 0.5], [1.0, 0.0], [9, 9], [9, 9]])
    assert [bar.get_width() for bar in distance.patches] == [0.1, 0.3, 0.2, 0.2]


def test_one_layer_and_quantised_experts_leave_their_maps_out(drawn, tmp_path):
    draw_routers({"a": {"layers": {"2": {**LAYERS["2"], "distance": None}}}}, tmp_path / "routers.png")
    load, together, following, distance = drawn[0].axes[:4]
    assert load.images and together.images
    assert not following.axison and not distance.axison and not distance.patches


def test_the_same_routers_give_the_same_bytes(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        draw_routers({"a": {"layers": LAYERS}, "b": {"layers": {"0": LAYERS["0"]}}}, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
