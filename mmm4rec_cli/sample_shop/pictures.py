"""Product pictures: a drawn thing in its colour, with its pattern, on a soft ground."""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mmm4rec_cli.sample_shop.goods import COLOUR_NAMES, HUES, PATTERNS

SIZE = 72
"""Pixels a side."""


def draw_picture(path: Path, colour: int, pattern: int, kind: int, rng: np.random.Generator) -> None:
    """Draw one item and write it as PNG.

    Args:
        path: where the picture goes.
        colour: index into `COLOUR_NAMES`; the hue varies by some degrees from item to item.
        pattern: index into `PATTERNS`.
        kind: chooses the outline.
        rng: source of everything that carries no meaning: place, size, lightness, ground.
    """
    hue = (HUES[COLOUR_NAMES[colour]] + rng.uniform(-11, 11)) % 360 / 360
    body = _rgb(hue, rng.uniform(0.60, 0.88), rng.uniform(0.66, 0.92))
    stripe = _rgb(hue, rng.uniform(0.70, 0.95), rng.uniform(0.30, 0.45))
    ground = _rgb(rng.random(), rng.uniform(0.0, 0.12), rng.uniform(0.86, 0.98))

    half_w, half_h = SIZE * rng.uniform(0.36, 0.46, 2)
    centre = SIZE / 2 + rng.uniform(-3, 3, 2)
    left, top, right, bottom = centre[0] - half_w, centre[1] - half_h, centre[0] + half_w, centre[1] + half_h

    thing = Image.new("RGB", (SIZE, SIZE), body)
    _stripes(ImageDraw.Draw(thing), PATTERNS[pattern], stripe, int(rng.integers(7, 10)))
    outline = Image.new("L", (SIZE, SIZE), 0)
    _outline(ImageDraw.Draw(outline), kind, left, top, right, bottom)

    picture = Image.new("RGB", (SIZE, SIZE), ground)
    ImageDraw.Draw(picture).ellipse((left, bottom - 5, right, bottom + 5), fill=_rgb(0.0, 0.0, 0.78))
    picture.paste(thing, mask=outline)
    picture.save(path, format="PNG", compress_level=6)


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _stripes(canvas: ImageDraw.ImageDraw, pattern: str, fill: tuple[int, int, int], pitch: int) -> None:
    for at in range(-SIZE, 2 * SIZE, pitch):
        if pattern == "rings":
            canvas.line((0, at, SIZE, at), fill=fill, width=3)
        elif pattern == "posts":
            canvas.line((at, 0, at, SIZE), fill=fill, width=3)
        elif pattern == "slants":
            canvas.line((at, 0, at + SIZE, SIZE), fill=fill, width=3)


def _outline(canvas: ImageDraw.ImageDraw, kind: int, left: float, top: float, right: float, bottom: float) -> None:
    """Fill the outline of a kind: eight of them, shared by all domains' eight kinds in order."""
    mid_x, mid_y = (left + right) / 2, (top + bottom) / 2
    inset = (right - left) / 5
    if kind == 0:
        canvas.ellipse((left, top, right, bottom), fill=255)
    elif kind == 1:
        canvas.rounded_rectangle((left, top, right, bottom), radius=8, fill=255)
    elif kind == 2:
        canvas.polygon([(left, bottom), (right, bottom), (right - inset, top), (left + inset, top)], fill=255)
    elif kind == 3:
        canvas.polygon([(left, top), (right, top), (right - inset, bottom), (left + inset, bottom)], fill=255)
    elif kind == 4:
        canvas.polygon([(mid_x, top), (right, mid_y), (mid_x, bottom), (left, mid_y)], fill=255)
    elif kind == 5:
        canvas.pieslice((left, top, right, bottom + (bottom - top)), 180, 360, fill=255)
    elif kind == 6:
        canvas.rectangle((left + inset, top, right - inset, bottom), fill=255)
        canvas.ellipse((left, mid_y - inset, right, mid_y + inset), fill=255)
    else:
        canvas.polygon([(mid_x, top), (right, mid_y), (right, bottom), (left, bottom), (left, mid_y)], fill=255)
