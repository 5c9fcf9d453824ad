"""Draws the scenes of the embedded world: 64×64 pixels, a shape in each cell that has one."""

import io
import math
import random

from PIL import Image, ImageDraw

PIXELS = 64

CELL = PIXELS // 2

RADIUS = {"small": (5, 7), "large": (10, 12)}

STRETCH = 1.15  # of what has corners, so that it fills about as many pixels as a circle

RGB = {"red": (214, 50, 45), "green": (48, 158, 72), "blue": (52, 88, 200), "yellow": (226, 194, 44)}

CORNERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}


def _outline(shape, x, y, radius):
    corners, start = {"square": (4, math.pi / 4), "triangle": (3, -math.pi / 2)}[shape]
    angles = [start + 2 * math.pi * corner / corners for corner in range(corners)]
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


def draw(scene):
    """
    The picture of a scene. Places, sizes, colours and the grey behind them vary a little, by the scene's jitter.

    Args:
        scene ([`~llava_mod_hf.data.scenes.Scene`]).

    Returns:
        `PIL.Image.Image`: RGB.
    """
    rng = random.Random(scene.jitter)
    grey = rng.randint(215, 245)
    image = Image.new("RGB", (PIXELS, PIXELS), (grey, grey, grey))
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        color, shape = thing.kind.split()
        radius = rng.uniform(*RADIUS[thing.size])
        column, row = CORNERS[thing.place]
        free = CELL / 2 - STRETCH * radius - 1
        x, y = (CELL * (cell + 0.5) + rng.uniform(-free, free) for cell in (column, row))
        fill = tuple(min(255, max(0, value + rng.randint(-24, 24))) for value in RGB[color])
        if shape == "circle":
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            canvas.polygon(_outline(shape, x, y, STRETCH * radius), fill=fill)
    return image


def encode(image):
    """`bytes` of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
