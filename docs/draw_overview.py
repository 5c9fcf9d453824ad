"""
Draws `overview.svg`, the README's picture: image → encoder → adaptor → language model with experts, the teacher above.

    python docs/draw_overview.py

Text and boxes alone, coloured by style classes, which follow the reader's light or dark page.
"""

from pathlib import Path

OUTPUT = Path(__file__).with_name("overview.svg")
WIDTH, HEIGHT = 890, 396
STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328; }
  .small { font-size: 12px; }
  .title { font-weight: 600; }
  .middle { text-anchor: middle; }
  .box { fill: #f6f8fa; stroke: #57606a; stroke-width: 1.4; }
  .trained { fill: #dff3e4; stroke: #1a7f37; stroke-width: 1.4; }
  .chosen { fill: #8fd6a1; stroke: #1a7f37; stroke-width: 1.4; }
  .teacher { fill: #e6eefb; stroke: #2f5d8a; stroke-width: 1.4; }
  .line { fill: none; stroke: #57606a; stroke-width: 1.4; }
  .lesson { fill: none; stroke: #2f5d8a; stroke-width: 1.8; stroke-dasharray: 6 4; }
  .head { fill: #57606a; }
  .lesson-head { fill: #2f5d8a; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .box { fill: #21262d; stroke: #8b949e; }
    .trained { fill: #12361f; stroke: #3fb950; }
    .chosen { fill: #1f7a38; stroke: #3fb950; }
    .teacher { fill: #14263d; stroke: #79b0e8; }
    .line { stroke: #8b949e; }
    .lesson { stroke: #79b0e8; }
    .head { fill: #8b949e; }
    .lesson-head { fill: #79b0e8; }
  }"""
TOP = 196  # of the student's row of boxes
EXPERTS = (False, True, False, True)  # which of the four a token goes to


def text(x, y, content, style="middle"):
    return f'<text x="{x}" y="{y}" class="{style}">{content}</text>'


def box(x, y, width, height, style, *lines):
    """A box with its lines of text in the middle, the first one in bold."""
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" class="{style}"/>']
    first = y + height / 2 + 5 - 9 * (len(lines) - 1)
    for number, line in enumerate(lines):
        parts.append(text(x + width / 2, first + 18 * number, line, "middle small" if number else "middle title"))
    return parts


def arrow(x, y, to_x, to_y, style="line", head="head"):
    """A straight arrow, to the right or downwards."""
    if y == to_y:
        points = ((to_x, to_y), (to_x - 8, to_y - 5), (to_x - 8, to_y + 5))
    else:
        points = ((to_x, to_y), (to_x - 5, to_y - 8), (to_x + 5, to_y - 8))
    corners = " ".join(f"{left},{top}" for left, top in points)
    return [f'<path d="M{x},{y} L{to_x},{to_y}" class="{style}"/>', f'<polygon points="{corners}" class="{head}"/>']


def experts(x, y):
    """A layer whose feed-forward network is a router and four experts, two of them chosen."""
    parts = box(x, y, 64, 40, "trained", "router")
    for number, chosen in enumerate(EXPERTS):
        left = x + 88 + 46 * number
        parts += box(left, y, 40, 40, "chosen" if chosen else "trained", f"E{number + 1}")
        if chosen:
            start, end = x + 32, left + 20
            parts.append(f'<path d="M{start},{y + 40} v14 H{end} v-14" class="line"/>')
    return parts


def draw():
    """The whole picture, as the text of an SVG file."""
    middle = TOP + 62
    parts = [
        *box(20, middle - 30, 74, 60, "box", "image"),
        *arrow(94, middle, 116, middle),
        *box(116, middle - 42, 122, 84, "box", "vision encoder", "CLIP or SigLIP", "frozen"),
        *arrow(238, middle, 260, middle),
        *box(260, middle - 30, 92, 60, "trained", "adaptor", "2-layer MLP"),
        *arrow(352, middle, 376, middle),
        f'<rect x="376" y="{TOP - 26}" width="346" height="176" rx="10" class="box"/>',
        text(549, TOP - 4, "small language model", "middle title"),
        *experts(400, TOP + 14),
        text(400, TOP + 90, "every second layer: 4 experts, 2 for each token", "small"),
        *box(400, TOP + 102, 298, 34, "trained", "layers in between: dense"),
        *arrow(722, middle, 750, middle),
        text(758, middle - 4, "the student's", "title"),
        text(758, middle + 15, "next tokens", "title"),
        *box(116, 28, 606, 68, "teacher", "teacher: a big vision-language model", "reads the same image and prompt"),
        *arrow(790, 62, 790, middle - 26, "lesson", "lesson-head"),
        '<path d="M722,62 H790" class="lesson"/>',
        text(776, 122, "mimic: KL on the response", "end small"),
        text(776, 140, "preference: the reference of DPO or KTO", "end small"),
        '<rect x="20" y="370" width="14" height="14" rx="3" class="trained"/>',
        text(42, 382, "trained", "small"),
        '<rect x="110" y="370" width="14" height="14" rx="3" class="chosen"/>',
        text(132, 382, "experts that a token goes to", "small"),
        '<rect x="330" y="370" width="14" height="14" rx="3" class="box"/>',
        text(352, 382, "frozen", "small"),
    ]
    label = "The student learns from a big teacher: image, vision encoder, adaptor, language model with experts"
    style = STYLE + "\n  .end { text-anchor: end; }"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">\n'
        f"<style>{style}\n</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    OUTPUT.write_text(draw(), encoding="utf-8")
