"""The picture that a run is summed up in: what models say of a few scenes, their measures, and their experts' load."""

from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea

WIDTH, HEIGHT = 15.0, 10.7  # inches

MARGIN = 0.45

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "muted": "#656d76",
    "rule": "#d8dee4",
    "absent": "#c4192b",
    "right": "#1a7f37",
    "error": "#1f2328",
}

DARK = {
    "paper": "#0d1117",
    "ink": "#e6edf3",
    "muted": "#9198a1",
    "rule": "#30363d",
    "absent": "#ff7b72",
    "right": "#3fb950",
    "error": "#e6edf3",
}

LONGEST = 56  # characters of a description that have room

SPACE = 3.6  # points between two words


@dataclass(frozen=True)
class Line:
    """
    What one model says of a picture.

    Args:
        name, color (`str`): of the model.
        pieces (`tuple[tuple[str, bool], ...]`): its words, and of each piece whether it names something absent.
        right (`bool`): whether it is right.
        note (`str`): what else there is to say of it, such as what it misses; in less than 50 characters.
    """

    name: str
    color: str
    pieces: tuple
    right: bool
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """
    A measure of several models.

    Args:
        title, subtitle (`str`).
        values (`tuple[tuple[str, str, float, float, float], ...]`): name, color, share, and its interval's ends.
    """

    title: str
    subtitle: str
    values: tuple


class _Page:
    """A figure whose axes are placed in inches from its top left corner."""

    def __init__(self, colors):
        self.colors = colors
        self.figure = Figure(figsize=(WIDTH, HEIGHT), facecolor=colors["paper"])

    def axes(self, left, top, width, height):
        axes = self.figure.add_axes(
            (left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT), facecolor="none"
        )
        axes.tick_params(colors=self.colors["muted"], length=0, labelsize=11)
        axes.spines[:].set_visible(False)
        return axes

    def text(self, left, top, words, *, size=12, color="ink", **options):
        return self.figure.text(
            left / WIDTH,
            1 - top / HEIGHT,
            words,
            fontsize=size,
            color=self.colors.get(color, color),
            **{"va": "baseline", **options},
        )

    def words(self, left, top, pieces):
        """Words of several colours on one line; `pieces` are text and options of it."""
        groups: list[list] = []  # a comma is no word of its own, though it is of another colour
        before = " "
        for text, options in pieces:
            for number, word in enumerate(text.split()):
                area = TextArea(word, textprops={"fontsize": 11.5, "color": self.colors["ink"], **options})
                if number == 0 and not text[0].isspace() and not before[-1].isspace():
                    groups[-1].append(area)
                else:
                    groups.append([area])
            before = text
        packed = [HPacker(children=group, align="baseline", pad=0, sep=0) for group in groups]
        box = AnnotationBbox(
            HPacker(children=packed, align="baseline", pad=0, sep=SPACE),
            (left / WIDTH, 1 - top / HEIGHT),
            xycoords="figure fraction",
            box_alignment=(0, 0),
            frameon=False,
            pad=0,
        )
        self.figure.add_artist(box)


def cut_short(pieces, longest=LONGEST):
    """Pieces of a text up to a number of characters, with an ellipsis if there were more."""
    kept, left = [], longest
    for text, absent in pieces:
        if len(text) > left:
            return (*kept, (text[:left].rstrip() + "…", absent))
        kept.append((text, absent))
        left -= len(text)
    return tuple(kept)


def _draw_example(page, left, top, picture, lines):
    """A picture, and beside it two rows for each model: who it is and how it did, and what it says."""
    side = 1.9
    axes = page.axes(left, top, side, side)
    axes.imshow(picture, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=page.colors["rule"])
    for number, line in enumerate(lines):
        x, y = left + side + 0.25, top + 0.16 + number * side / len(lines)
        page.text(x, y, "✓" if line.right else "✗", color="right" if line.right else "absent", weight="bold")
        page.text(x + 0.2, y, line.name, color=line.color, weight="bold")
        page.text(x + 1.3, y, line.note, size=11, color="muted", style="italic")
        red = {"color": page.colors["absent"], "weight": "bold"}
        pieces = cut_short(line.pieces) or (("(nothing)", False),)
        page.words(x + 0.2, y + 0.235, [(text, red if absent else {}) for text, absent in pieces])


def _draw_bars(page, left, top, width, height, bars, *, names):
    page.text(left, top, bars.title, size=13, weight="bold")
    page.text(left, top + 0.1, bars.subtitle, size=10.5, color="muted", linespacing=1.25, va="top")
    axes = page.axes(left, top + 0.68, width, height - 0.68)
    for row, (_, color, share, low, high) in enumerate(bars.values):
        axes.barh(row, share, height=0.66, color=color)
        error = {"ecolor": page.colors["error"], "elinewidth": 1.3, "capsize": 2.5, "capthick": 1.3}
        axes.errorbar(share, row, xerr=[[max(0, share - low)], [max(0, high - share)]], fmt="none", **error)
        axes.text(
            max(share, high) + 0.03, row, f"{100 * share:.0f}", va="center", fontsize=11, color=page.colors["ink"]
        )
    axes.set_xlim(0, 1.12)
    axes.set_ylim(len(bars.values) - 0.5, -0.5)
    axes.set_xticks([0, 0.5, 1], ["0", "50", "100 %"])
    axes.set_yticks(range(len(bars.values)), [name for name, *_ in bars.values] if names else [])
    axes.tick_params(axis="y", labelsize=12, labelcolor=page.colors["ink"], pad=6)
    axes.spines["left"].set(visible=True, color=page.colors["rule"])
    for share in (0.5, 1.0):
        axes.axvline(share, color=page.colors["rule"], linewidth=0.8, zorder=0)


def _draw_loads(page, left, top, width, height, loads):
    """A bar for each layer, cut into its experts' shares."""
    page.text(left, top, "Expert load", size=13, weight="bold")
    page.text(
        left, top + 0.1, "share of choices; equal\nwidths are an even load", size=10.5, color="muted",
        linespacing=1.25, va="top",
    )  # fmt: skip
    axes = page.axes(left, top + 0.68, width, height - 0.68)
    for row, shares in enumerate(loads.values()):
        start = 0.0
        for expert, share in enumerate(shares):
            color = colormaps["viridis"](0.15 + 0.7 * expert / max(len(shares) - 1, 1))
            axes.barh(row, share, left=start, height=0.5, color=color, edgecolor=page.colors["paper"], linewidth=1.5)
            if share > 0.12:
                ink = "#ffffff" if expert < 0.6 * len(shares) else "#1f2328"
                axes.text(
                    start + share / 2, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=11, color=ink
                )
            start += share
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(loads), 3) - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks(range(len(loads)), [f"layer {layer}" for layer in loads])
    axes.tick_params(axis="y", labelsize=12, labelcolor=page.colors["ink"], pad=6)


def summary_figure(*, title, subtitle, examples, bars, loads, dark=False):
    """
    The picture.

    Args:
        title, subtitle (`str`).
        examples (`list[tuple[PIL.Image.Image, list[Line]]]`): up to four pictures, and what the models say of each.
        bars (`list[Bars]`): up to four measures of the same models.
        loads (`dict[int, list[float]]`): experts' shares by layer, as `loads_of` returns them.
        dark (`bool`, *optional*, defaults to `False`): light on dark.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there are more examples or measures than there is room for.
    """
    if len(examples) > 4 or len(bars) > 4:
        raise ValueError(f"{len(examples)} examples and {len(bars)} measures are given, with room for four of each.")
    page = _Page(DARK if dark else LIGHT)
    page.text(MARGIN, 0.72, title, size=21, weight="bold")
    page.text(MARGIN, 1.06, subtitle, size=12.5, color="muted")

    page.text(MARGIN, 1.72, "What they say", size=15, weight="bold")
    heading = "test pictures, the first of which they say different things; in red what is not there"
    page.text(MARGIN + 1.75, 1.72, heading, size=12, color="muted")
    column = (WIDTH - 2 * MARGIN + 0.25) / 2
    for number, (picture, lines) in enumerate(examples):
        _draw_example(page, MARGIN + column * (number % 2), 1.98 + 2.35 * (number // 2), picture, lines)

    page.text(MARGIN, 6.95, "How often", size=15, weight="bold")
    page.text(MARGIN + 1.3, 6.95, "with 95 % intervals over the questions", size=12, color="muted")
    left, top, width, height = MARGIN + 1.45, 7.4, 2.05, 2.75
    for number, each in enumerate(bars):
        _draw_bars(page, left + number * (width + 0.38), top, width, height, each, names=number == 0)
    if loads:
        start = left + len(bars) * (width + 0.38) + 0.75
        _draw_loads(page, start, top, WIDTH - MARGIN - start, height, loads)
    return page.figure


def draw_summary(path, **drawn):
    """
    Writes the picture.

    Args:
        path (`str`, `Path` or a binary file): PNG to write.
        drawn: what [`summary_figure`] takes.
    """
    summary_figure(**drawn).savefig(path, format="png", dpi=150, metadata={"Software": None})
