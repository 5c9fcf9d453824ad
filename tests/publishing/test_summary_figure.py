"""The picture of a run: everything on it, nothing over anything else, in the colours that say what they mean."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.offsetbox import AnnotationBbox, TextArea
from matplotlib.text import Text
from PIL import Image

from llava_mod_hf.publishing.summary_figure import DARK, LIGHT, Bars, Line, cut_short, draw_summary, summary_figure

PICTURE = Image.new("RGB", (64, 64), (200, 200, 200))

LONG = (("a ", False), ("yellow triangle", True), (", a green square and a yellow triangle", False))

LINES = [
    Line("supervised", "#d9822b", LONG, False, "misses yellow triangle, yellow square"),
    Line("distilled", "#3b7dd0", (("a red square", False),), True),
    Line("preferred", "#2a9d6f", (), False, "misses all three"),
    Line("teacher", "#7d8894", (("a red square, " * 9, False),), False, "names red square again"),
]

VALUES = (
    ("blind", "#a8b1ba", 0.0, 0.0, 0.0),
    ("distilled dense", "#8cb4e0", 0.5, 0.4, 0.6),
    ("preferred", "#2a9d6f", 1, 1, 1),
)


def drawn(**changes):
    bars = [Bars(title, "descriptions that name an\nabsent thing; less is better", VALUES) for title in "ABCD"]
    return {
        "title": "47 % right when distilled, 43 % when trained on the labels",
        "subtitle": "1,500 balanced test questions",
        "examples": [(PICTURE, LINES)] * 4,
        "bars": bars,
        "loads": {0: [0.25, 0.3, 0.2, 0.25], 2: [0.7, 0.1, 0.1, 0.1]},
        **changes,
    }


def texts(figure):
    """`[(text, extent in pixels)]` of everything that is written."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    shown = [each for each in figure.findobj(Text) if each.get_visible() and each.get_text().strip()]
    return [(each.get_text(), each.get_window_extent(renderer)) for each in shown]


def test_everything_is_there():
    said = [words for words, _ in texts(summary_figure(**drawn()))]
    assert {"What they say", "How often", "Expert load", "layer 0", "layer 2", "✓", "✗"} <= set(said)
    assert said.count("misses all three") == said.count("(nothing)") == 4
    assert said.count("distilled dense") == 1  # beside the first bars alone
    assert {"0", "50", "100"} <= set(said) and {"70", "30"} <= set(said)
    assert "10" not in said  # no room in the narrow ones


def test_nothing_is_over_anything_else():
    figure = summary_figure(**drawn())
    found, page = texts(figure), figure.bbox
    for words, extent in found:
        assert page.x0 < extent.x0 and extent.x1 < page.x1 and page.y0 < extent.y0 and extent.y1 < page.y1, words
    for (one, first), (other, second) in itertools.combinations(found, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert width < 1 or height < 0.35 * min(first.height, second.height), (one, other)
    pictures = [axes.get_window_extent() for axes in figure.axes if axes.images]
    assert len(pictures) == 4
    for (words, extent), picture in itertools.product(found, pictures):
        assert not extent.overlaps(picture), words


def test_what_is_absent_is_red_and_joined_to_its_comma():
    figure = summary_figure(**drawn(examples=[(PICTURE, LINES[:1])]))
    figure.draw(FigureCanvasAgg(figure).get_renderer())
    colors = {area.get_text(): area._text.get_color() for area in figure.findobj(TextArea)}
    assert colors["yellow"] == colors["a"] == LIGHT["ink"]  # the second triangle, which is there
    first = next(area for area in figure.findobj(TextArea) if area.get_text() == "yellow")
    assert first._text.get_color() == LIGHT["absent"]
    (box,) = figure.findobj(AnnotationBbox)
    assert [[area.get_text() for area in group.get_children()] for group in box.offsetbox.get_children()][:4] == [
        ["a"], ["yellow"], ["triangle", ","], ["a"],
    ]  # fmt: skip


def test_bars_are_as_long_as_their_values_and_errors_as_wide():
    figure = summary_figure(**drawn(bars=drawn()["bars"][:1]))
    axes = next(each for each in figure.axes if len(each.patches) == 3)
    assert [bar.get_width() for bar in axes.patches] == [0, 0.5, 1]
    ends = [bar.get_segments()[0][:, 0] for bar in axes.collections]
    assert np.allclose(ends, [[0, 0], [0.4, 0.6], [1, 1]])


def test_a_load_is_a_bar_cut_into_shares():
    figure = summary_figure(**drawn(bars=[]))
    (axes,) = [each for each in figure.axes if not each.images]
    assert np.allclose([bar.get_width() for bar in axes.patches], [0.25, 0.3, 0.2, 0.25, 0.7, 0.1, 0.1, 0.1])
    assert summary_figure(**drawn(bars=[], loads={})).axes[-1].images  # a dense student has none


@pytest.mark.parametrize(("dark", "colors"), [(False, LIGHT), (True, DARK)])
def test_the_file_is_a_picture_of_its_colours(dark, colors):
    file = io.BytesIO()
    draw_summary(file, **drawn(dark=dark, examples=[]))
    image = Image.open(file).convert("RGB")
    assert image.size == (2250, 1605)
    assert "#{:02x}{:02x}{:02x}".format(*image.getpixel((3, 3))) == colors["paper"]


def test_a_long_text_is_cut():
    assert cut_short(LONG) == LONG
    assert cut_short((("abc ", False), ("defgh", True)), longest=6) == (("abc ", False), ("de…", True))


def test_more_than_there_is_room_for_is_refused():
    with pytest.raises(ValueError, match="5 examples and 4 measures"):
        summary_figure(**drawn(examples=[(PICTURE, LINES)] * 5))
