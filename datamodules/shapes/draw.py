"""Draws Shapes scenes: backgrounds, moods, and things with their masks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import Image, ImageChops, ImageDraw

from .scene import COLORS, SIZE, Scene, Thing

_SCALE = 4  # everything is drawn four times larger and averaged down, which smooths the edges
_BIG = SIZE * _SCALE

Color = tuple[int, int, int]
Points = list[tuple[float, float]]


def draw_scene(scene: Scene, rng: random.Random) -> tuple[Image.Image, list[Image.Image]]:
    """Draw a scene.

    Args:
        scene: What to show.
        rng: Source of the small variations (horizon, tint) that leave the scene's words true.

    Returns:
        The RGB picture, and for every thing its mask: mode "1", both `SIZE` × `SIZE`.
    """
    canvas = Image.new("RGB", (_BIG, _BIG))
    _PLACES[scene.place](ImageDraw.Draw(canvas), rng)
    canvas = _MOODS[scene.mood](canvas, rng)
    masks = []
    for thing in scene.things:
        silhouette = _silhouette(thing, grow=0)
        # A dark rim keeps a thing apart from a background of its own color; a black thing gets a light one.
        rim = (235, 235, 235) if thing.color == "black" else (20, 20, 20)
        canvas.paste(rim, mask=_silhouette(thing, grow=5))
        canvas.paste(_vary(COLORS[thing.color], rng, 8), mask=silhouette)
        masks.append(silhouette.reduce(_SCALE).point(lambda level: 255 if level > 127 else 0).convert("1"))
    return canvas.reduce(_SCALE), masks


def _vary(color: Color, rng: random.Random, spread: int) -> Color:
    red, green, blue = (min(255, max(0, level + rng.randint(-spread, spread))) for level in color)
    return red, green, blue


# --- things ---------------------------------------------------------------------------------------------


def _silhouette(thing: Thing, grow: int) -> Image.Image:
    """The thing in white on black at drawing scale, `grow` drawing pixels larger all round."""
    mask = Image.new("L", (_BIG, _BIG))
    draw = ImageDraw.Draw(mask)
    x, y = thing.centre[0] * _SCALE, thing.centre[1] * _SCALE
    radius = thing.radius * _SCALE + grow
    if thing.kind in ("circle", "ring", "moon"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if thing.kind == "ring":
            hole = thing.radius * _SCALE * 0.5 - grow
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        elif thing.kind == "moon":
            bite = Image.new("L", (_BIG, _BIG))
            hole, shift = thing.radius * _SCALE * 0.85 - grow, thing.radius * _SCALE * 0.55
            ImageDraw.Draw(bite).ellipse((x + shift - hole, y - hole, x + shift + hole, y + hole), fill=255)
            mask = ImageChops.subtract(mask, bite)
    else:
        points = [(x + px * radius, y + py * radius) for px, py in _OUTLINES[thing.kind]]
        draw.polygon(points, fill=255)
    return mask


def _star() -> Points:
    spokes = [(1.0 if i % 2 == 0 else 0.42, math.pi * i / 5) for i in range(10)]
    return [(length * math.sin(turn), -length * math.cos(turn)) for length, turn in spokes]


def _heart() -> Points:
    turns = [2 * math.pi * i / 60 for i in range(60)]
    across = [math.sin(t) ** 3 for t in turns]
    up = [(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 for t in turns]
    return [(x, -y) for x, y in zip(across, up, strict=True)]


_ARM = 0.34  # half the width of a cross's arms

_OUTLINES: dict[str, Points] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "diamond": [(0.0, -1.0), (0.75, 0.0), (0.0, 1.0), (-0.75, 0.0)],
    "arrow": [(-1.0, -0.3), (0.1, -0.3), (0.1, -0.9), (1.0, 0.0), (0.1, 0.9), (0.1, 0.3), (-1.0, 0.3)],
    "cross": [
        (-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM),
        (_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM),
    ],
    "star": _star(),
    "heart": _heart(),
}  # fmt: skip


# --- places ---------------------------------------------------------------------------------------------


def _bands(draw: ImageDraw.ImageDraw, rng: random.Random, above: Color, below: Color) -> int:
    """Fill the picture with two colors and return where they meet."""
    horizon = int(_BIG * rng.uniform(0.4, 0.6))
    draw.rectangle((0, 0, _BIG, horizon), fill=_vary(above, rng, 10))
    draw.rectangle((0, horizon, _BIG, _BIG), fill=_vary(below, rng, 10))
    return horizon


def _beach(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    horizon = _bands(draw, rng, (135, 200, 240), (235, 210, 150))
    draw.rectangle((0, horizon - 30, _BIG, horizon), fill=(60, 140, 200))


def _forest(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _bands(draw, rng, (70, 120, 70), (45, 80, 40))
    for left in range(rng.randint(0, 20), _BIG, 40):
        draw.rectangle((left, 0, left + 12, _BIG), fill=(85, 60, 35))


def _desert(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    horizon = _bands(draw, rng, (245, 205, 150), (215, 150, 85))
    left = rng.randint(-60, 60)
    draw.ellipse((left, horizon - 30, left + 220, horizon + 120), fill=(200, 130, 70))


def _city(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _bands(draw, rng, (175, 185, 195), (95, 95, 100))
    for left in range(0, _BIG, 32):
        top = rng.randint(20, 110)
        draw.rectangle((left, top, left + 26, _BIG - 60), fill=(120, 125, 135))
        for row in range(top + 8, _BIG - 70, 20):
            draw.rectangle((left + 8, row, left + 16, row + 8), fill=(240, 230, 160))


def _sea(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.rectangle((0, 0, _BIG, _BIG), fill=_vary((40, 110, 180), rng, 10))
    start = rng.randint(-16, 16)
    for top in range(0, _BIG, 28):
        for left in range(start - 32, _BIG, 32):
            draw.arc((left, top, left + 32, top + 20), 0, 180, fill=(150, 205, 235), width=5)


def _meadow(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    horizon = _bands(draw, rng, (150, 210, 250), (110, 190, 70))
    for _ in range(25):
        x, y = rng.randint(0, _BIG), rng.randint(horizon, _BIG)
        draw.ellipse((x, y, x + 8, y + 8), fill=rng.choice(((250, 240, 120), (250, 250, 250))))


def _mountain(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _bands(draw, rng, (190, 215, 235), (125, 125, 130))
    peak = rng.randint(90, 166)
    draw.polygon([(peak, 20), (peak + 150, _BIG), (peak - 150, _BIG)], fill=(120, 115, 120))
    draw.polygon([(peak, 20), (peak + 38, 80), (peak - 38, 80)], fill=(245, 245, 250))


def _space(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.rectangle((0, 0, _BIG, _BIG), fill=_vary((18, 14, 48), rng, 6))
    for _ in range(45):
        x, y, size = rng.randint(0, _BIG), rng.randint(0, _BIG), rng.randint(3, 7)
        draw.ellipse((x, y, x + size, y + size), fill=(255, 255, 225))


_PLACES: dict[str, Callable[[ImageDraw.ImageDraw, random.Random], None]] = {
    "beach": _beach,
    "forest": _forest,
    "desert": _desert,
    "city": _city,
    "sea": _sea,
    "meadow": _meadow,
    "mountain": _mountain,
    "space": _space,
}


# --- moods ----------------------------------------------------------------------------------------------


def _cheerful(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """A sun with rays, half behind the upper edge."""
    draw = ImageDraw.Draw(canvas)
    x = _BIG // 2 + rng.randint(-6, 6)
    for turn in range(0, 181, 30):
        end = (x + 62 * math.cos(math.radians(turn)), 62 * math.sin(math.radians(turn)))
        draw.line((x, 0, *end), fill=(255, 220, 60), width=6)
    draw.ellipse((x - 36, -36, x + 36, 36), fill=(255, 210, 40))
    return canvas


def _gloomy(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """Darker and greyer, with rain."""
    canvas = Image.blend(canvas, Image.new("RGB", canvas.size, (55, 60, 70)), 0.6)
    draw = ImageDraw.Draw(canvas)
    for _ in range(60):
        x, y = rng.randint(0, _BIG), rng.randint(-20, _BIG)
        draw.line((x, y, x - 8, y + 26), fill=(165, 175, 190), width=3)
    return canvas


def _calm(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """Pale, as through haze."""
    return Image.blend(canvas, Image.new("RGB", canvas.size, (240, 240, 245)), rng.uniform(0.5, 0.6))


def _mysterious(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """A violet veil, thickest at the edges."""
    canvas = Image.blend(canvas, Image.new("RGB", canvas.size, (90, 30, 120)), 0.35)
    vignette = Image.radial_gradient("L").resize(canvas.size).point(lambda level: max(0, level - 90))
    canvas.paste(_vary((40, 5, 60), rng, 5), mask=vignette)
    return canvas


_MOODS: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "cheerful": _cheerful,
    "gloomy": _gloomy,
    "calm": _calm,
    "mysterious": _mysterious,
}
