"""Shapes: a generated data set of small pictures, written in the formats of COCO, VQAv2 and Visual Genome."""

from .files import write_shapes
from .scene import COLORS, KINDS, MOODS, PLACES, Scene, Thing, random_scene

__all__ = ["COLORS", "KINDS", "MOODS", "PLACES", "Scene", "Thing", "random_scene", "write_shapes"]
