"""What a Shapes picture shows: one to three things of a kind and a color, in a place, under a mood."""

from __future__ import annotations

import random
from dataclasses import dataclass

SIZE = 64
"""Width and height of a picture in pixels."""

KINDS = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring", "moon", "arrow")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (250, 135, 10),
    "yellow": (250, 225, 30),
    "green": (30, 150, 50),
    "blue": (30, 70, 220),
    "purple": (130, 35, 170),
    "pink": (255, 140, 195),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}

PLACES: dict[str, str] = {
    "beach": "on the beach",
    "forest": "in the forest",
    "desert": "in the desert",
    "city": "in the city",
    "sea": "on the sea",
    "meadow": "in the meadow",
    "mountain": "on the mountain",
    "space": "in space",
}
"""Place word → how a caption says it."""

MOODS = ("cheerful", "gloomy", "calm", "mysterious")

# Centres of the four cells of a picture. They lie on corners of 8-pixel patches, so that a vision tower with
# that patch size sees each kind cut in the same way wherever it stands.
_CENTRES = ((16, 16), (48, 16), (16, 48), (48, 48))
_COUNT_WEIGHTS = (5, 3, 2)


@dataclass(frozen=True)
class Thing:
    """One object of a picture: `centre` and `radius` in pixels."""

    kind: str
    color: str
    centre: tuple[int, int]
    radius: int


@dataclass(frozen=True)
class Scene:
    """All that a picture shows; `things` in reading order."""

    place: str
    mood: str
    things: tuple[Thing, ...]


def random_scene(rng: random.Random, max_things: int = 3) -> Scene:
    """Draw one scene: half of them have one thing, three in ten two, two in ten three; `max_things` at most."""
    count = min(max_things, rng.choices((1, 2, 3), weights=_COUNT_WEIGHTS)[0])
    centres = sorted(rng.sample(_CENTRES, count), key=lambda centre: (centre[1], centre[0]))
    things = tuple(
        Thing(rng.choice(KINDS), rng.choice(tuple(COLORS)), centre, rng.randint(11, 15)) for centre in centres
    )
    return Scene(rng.choice(tuple(PLACES)), rng.choice(MOODS), things)
