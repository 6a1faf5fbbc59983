"""Pictures of scenes, drawn with Pillow at twice the size, and what stands where on the patch grid."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from llava_fa.world.scene import (
    CHARACTER_WIDTH,
    COLORS,
    IMAGE_SIZE,
    KINDS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    Writing,
)

GRID = 8
PATCH = IMAGE_SIZE // GRID
SCALE = 2
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789$"
FONTS = ("DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "DejaVuSans", "DejaVuSansMono")


def _nothing() -> np.ndarray:
    return np.zeros(GRID * GRID, np.int64)


@dataclasses.dataclass(frozen=True)
class PatchLabels:
    """What each of the GRID × GRID patches shows; int64 arrays [64], 0 means nothing of the kind.

    Dense supervision of the vision tower (`llava_fa.world.learner`) is made of them; ``anchor`` marks the patch that
    holds an object's centre, ``center`` [64, 2] is that centre over the image size (only meaningful there);
    ``focus`` numbers, from 1, things before writings, the item to be seen there: a thing's centre, all of a writing.
    """

    color: np.ndarray = dataclasses.field(default_factory=_nothing)
    shape: np.ndarray = dataclasses.field(default_factory=_nothing)
    size: np.ndarray = dataclasses.field(default_factory=_nothing)
    anchor: np.ndarray = dataclasses.field(default_factory=_nothing)
    character: np.ndarray = dataclasses.field(default_factory=_nothing)
    center: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((GRID * GRID, 2), np.float32))
    focus: np.ndarray = dataclasses.field(default_factory=_nothing)


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene as RGB, IMAGE_SIZE square: background, clutter, things, writing, lighting, blur and noise."""
    picture = _background(rng)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.randint(0, 5)):
        _clutter(draw, rng)
    for item in (*scene.things, *scene.writings):
        if isinstance(item, Thing):
            _draw_thing(draw, item, _jitter(COLORS[item.color], rng), outline=rng.random() < 0.4)
        else:
            _draw_writing(draw, item, _jitter(COLORS[item.color], rng), rng.choice(FONTS))
    picture = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return _photograph(picture, scene, rng)


def patch_labels(scene: Scene) -> PatchLabels:
    """What every patch shows; a patch belongs to the item that covers most of it, a centre always to its item."""
    labels = PatchLabels()
    if scene.condition == "ruined":
        return labels
    owner = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
    draw = ImageDraw.Draw(owner)
    items = (*scene.things, *scene.writings)
    for number, item in enumerate(items, start=1):
        if isinstance(item, Thing):
            for polygon in _outline(item, 1):
                draw.polygon(polygon, fill=number)
        else:
            draw.rectangle(item.box, fill=number)
    tiles = np.asarray(owner).reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(GRID * GRID, -1)
    coverage = (tiles[:, :, None] == np.arange(1, len(items) + 1)).mean(1)
    item_of = {patch: coverage[patch].argmax() for patch in np.flatnonzero(coverage.max(1, initial=0) >= 0.3)}
    for number, item in enumerate(items):
        at = _patch(item.x, item.y)
        item_of[at] = number
        labels.anchor[at] = 1
        labels.center[at] = item.x / IMAGE_SIZE, item.y / IMAGE_SIZE
    for at, number in item_of.items():
        item = items[number]
        labels.color[at] = 1 + list(COLORS).index(item.color)
        if isinstance(item, Thing):
            labels.shape[at] = 1 + SHAPES.index(item.shape)
            labels.size[at] = 1 + list(SIZES).index(item.size)
        else:
            labels.shape[at] = 1 + len(SHAPES) + KINDS.index(item.kind)
        if labels.anchor[at] or isinstance(item, Writing):
            labels.focus[at] = 1 + number
    for writing in scene.writings:
        for patch, glyph in zip(character_patches(writing), writing.text, strict=True):
            labels.character[patch] = 1 + CHARACTERS.index(glyph)
    return labels


def character_patches(writing: Writing) -> list[int]:
    """The patch that holds the centre of each character."""
    return [_patch(x, writing.y) for x, _ in _character_centers(writing)]


def _patch(x: float, y: float) -> int:
    return int(y // PATCH) * GRID + int(x // PATCH)


def _character_centers(writing: Writing) -> list[tuple[float, str]]:
    left = writing.x - (len(writing.text) - 1) * CHARACTER_WIDTH / 2
    return [(left + i * CHARACTER_WIDTH, glyph) for i, glyph in enumerate(writing.text)]


@functools.lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # its wheel ships DejaVu: the same letters on every machine

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def _jitter(color: tuple[int, int, int], rng: random.Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, channel + rng.randint(-14, 14))) for channel in color)


def _background(rng: random.Random) -> Image.Image:
    grey = rng.randint(70, 235)
    corners = np.array([[[grey + rng.randint(-22, 22) for _ in range(3)] for _ in range(2)] for _ in range(2)])
    small = Image.fromarray(corners.clip(0, 255).astype(np.uint8))
    return small.resize((IMAGE_SIZE * SCALE, IMAGE_SIZE * SCALE), Image.Resampling.BILINEAR)


def _clutter(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    """Thin grey strokes: edges that mean nothing."""
    grey = rng.randint(50, 210)
    start = [rng.randint(0, IMAGE_SIZE * SCALE) for _ in range(2)]
    end = [coordinate + rng.randint(-50, 50) for coordinate in start]
    draw.line([*start, *end], fill=(grey, grey, grey), width=rng.randint(1, 3))


def _outline(thing: Thing, scale: float) -> list[list[tuple[float, float]]]:
    """The thing's polygons around its centre; a ring's hole is drawn by the caller, its owner map has none."""
    x, y, r = thing.x * scale, thing.y * scale, thing.radius * scale

    def around(angles: list[float], radii: list[float]) -> list[tuple[float, float]]:
        return [(x + q * math.sin(a), y - q * math.cos(a)) for a, q in zip(angles, radii, strict=True)]

    if thing.shape in ("circle", "ring"):
        return [around([2 * math.pi * i / 28 for i in range(28)], [r] * 28)]
    if thing.shape == "square":
        s = 0.88 * r
        return [[(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]]
    if thing.shape == "triangle":
        return [[(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)]]
    if thing.shape == "diamond":
        return [[(x, y - r), (x + 0.72 * r, y), (x, y + r), (x - 0.72 * r, y)]]
    if thing.shape == "star":
        return [around([math.pi * i / 5 for i in range(10)], [1.08 * r if i % 2 == 0 else 0.45 * r for i in range(10)])]
    if thing.shape == "cross":
        s = 0.34 * r
        return [
            [(x - s, y - r), (x + s, y - r), (x + s, y + r), (x - s, y + r)],
            [(x - r, y - s), (x + r, y - s), (x + r, y + s), (x - r, y + s)],
        ]
    points = []  # heart
    for i in range(32):
        t = 2 * math.pi * i / 32
        u = 16 * math.sin(t) ** 3
        v = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x + r * u / 16.5, y - r * (v + 2.5) / 15.5))
    return [points]


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, color: tuple[int, ...], *, outline: bool) -> None:
    if thing.shape == "ring":
        x, y, r = thing.x * SCALE, thing.y * SCALE, thing.radius * SCALE
        draw.ellipse((x - r, y - r, x + r, y + r), outline=color, width=max(2, round(0.38 * r)))
        return
    for polygon in _outline(thing, SCALE):
        draw.polygon(polygon, fill=color)
    if outline and thing.shape != "cross":
        dark = tuple(channel // 2 for channel in color)
        draw.line([*_outline(thing, SCALE)[0], _outline(thing, SCALE)[0][0]], fill=dark, width=2)


def _draw_writing(draw: ImageDraw.ImageDraw, writing: Writing, color: tuple[int, ...], font_name: str) -> None:
    left, top, right, bottom = (SCALE * edge for edge in writing.box)
    luminance = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2]
    ink = (15, 15, 15) if luminance > 120 else (245, 245, 245)
    if writing.kind == "sign":
        draw.rectangle((left, top, right, bottom), fill=color, outline=ink, width=2)
    elif writing.kind == "tag":  # a bite out of the left edge tells a tag from the others
        middle = (top + bottom) / 2
        draw.polygon(
            [(left + 5, top), (right, top), (right, bottom), (left + 5, bottom), (left - 3, middle)], fill=color
        )
    else:
        draw.rounded_rectangle((left, top, right, bottom), radius=10, fill=color)
    font = _font(font_name, 15 * SCALE)
    for x, glyph in _character_centers(writing):
        draw.text((x * SCALE, writing.y * SCALE), glyph, fill=ink, font=font, anchor="mm")


def _photograph(picture: Image.Image, scene: Scene, rng: random.Random) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(64))
    if scene.condition == "ruined":
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(9, 14)))
    elif scene.condition == "mild" and rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 0.8)))
    pixels = np.asarray(picture, np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    slope = math.cos(angle) * ramp[None, :, None] + math.sin(angle) * ramp[:, None, None]
    brightness = {"clear": (0.85, 1.05), "mild": (0.6, 0.8), "ruined": (0.15, 1.2)}[scene.condition]
    pixels = pixels * (rng.uniform(*brightness) + rng.uniform(0, 0.12) * slope)
    sigma = {"clear": (0, 5), "mild": (6, 12), "ruined": (8, 30)}[scene.condition]
    pixels = pixels + noise.standard_normal(pixels.shape, np.float32) * rng.uniform(*sigma)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
