"""Which part of the original picture each visual token covers, found by asking the model's own processor.

Processors resize, crop, pad and tile in many ways. Rather than repeat their arithmetic, a picture whose colors are its
coordinates is sent through: red grows from left to right, green from top to bottom. What comes out says where every
pixel that the model sees came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

# Near the ends of the scale resampling overshoots and is clipped.
_LOW, _HIGH = 8.0, 247.0


@dataclass(frozen=True)
class PatchGrid:
    """The visual tokens of one picture, in the order of their positions.

    Attributes:
        tile: Number of the crop that each of the P tokens belongs to [P].
        row: Row of the token in its crop [P].
        column: Column of the token in its crop [P].
        boxes: Left, top, right, bottom in pixels of the original picture [P, 4]; beyond its borders where the processor
            pads.
    """

    tile: Tensor
    row: Tensor
    column: Tensor
    boxes: Tensor


def find_patch_grid(image_processor: Any, width: int, height: int, tokens: int) -> PatchGrid:
    """Find the grid of pictures of one size.

    Args:
        image_processor: The model's image processor.
        width: Width of the original picture in pixels, at least 2.
        height: Its height, at least 2.
        tokens: Visual tokens that such a picture becomes.

    Raises:
        ValueError: The processor gives no crops in rows and columns of pixels, or they do not divide into `tokens`.
    """
    pixels = image_processor(
        images=[_coordinates(width, height)], do_normalize=False, do_rescale=False, return_tensors="pt"
    )["pixel_values"]
    if pixels.ndim < 4 or pixels.shape[-3] != 3:
        raise ValueError(
            f"{type(image_processor).__name__} gives pictures as {tuple(pixels.shape)}, not as crops of "
            "[3, height, width]; patches cannot be placed"
        )
    crops = pixels.reshape(-1, *pixels.shape[-3:]).float()
    rows, columns = _shape(tokens, *crops.shape)
    indices = torch.cartesian_prod(torch.arange(len(crops)), torch.arange(rows), torch.arange(columns))
    tile, row, column = indices.unbind(dim=1)
    boxes = torch.empty(tokens, 4)
    for number, crop in enumerate(crops):
        here = tile == number
        across = _edges(crop[0].mean(dim=0), crop[2].mean(dim=0), columns, width)
        down = _edges(crop[1].mean(dim=1), crop[2].mean(dim=1), rows, height)
        boxes[here] = torch.stack(
            [across[column[here]], down[row[here]], across[column[here] + 1], down[row[here] + 1]], dim=1
        )
    return PatchGrid(tile, row, column, boxes)


def _coordinates(width: int, height: int) -> Image.Image:
    """A picture whose red is its column and whose green is its row, both from 0 to 255."""
    red = np.linspace(0, 255, width)[None, :] + _dither(height)[:, None]
    green = np.linspace(0, 255, height)[:, None] + _dither(width)[None, :]
    colors = np.stack([red, green, np.zeros((height, width))], axis=2)
    return Image.fromarray(colors.round().clip(0, 255).astype(np.uint8))


def _dither(length: int) -> NDArray[np.float64]:
    """Shifts of up to half a level along the other side, so that rounding to levels averages out over a line."""
    return np.linspace(0, 8, length, endpoint=False) % 1 - 0.5


def _shape(tokens: int, crops: int, channels: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of one crop whose patches are square."""
    per_crop = tokens // crops
    columns = round((per_crop * width / height) ** 0.5)
    rows = per_crop // max(columns, 1)
    if rows * columns * crops != tokens:
        raise ValueError(
            f"{tokens} visual tokens do not divide into {crops} crops of {height} x {width} pixels; this "
            "model arranges them in another way"
        )
    return rows, columns


def _edges(scale: Tensor, blue: Tensor, cells: int, length: int) -> Tensor:
    """Original coordinates [cells + 1] of the cell borders along one side of a crop.

    Args:
        scale: Mean coordinate color along the side [pixels].
        blue: Mean blue along the side [pixels]; only padding has any.
        cells: Patches along the side.
        length: Length of that side of the original picture in pixels.
    """
    known = (scale > _LOW) & (scale < _HIGH) & (blue < 1)
    if int(known.sum()) < 2:
        known = torch.ones_like(known)
    positions = torch.arange(len(scale), dtype=torch.float64) + 0.5
    # Resizing, cropping and padding are affine, so one straight line holds for the whole side.
    design = torch.stack([positions[known], torch.ones(int(known.sum()), dtype=torch.float64)], dim=1)
    originals = scale[known].double() * (length - 1) / 255 + 0.5
    slope, offset = torch.linalg.lstsq(design, originals[:, None]).solution.flatten().tolist()
    borders = torch.arange(cells + 1, dtype=torch.float64) * len(scale) / cells
    edges: Tensor = slope * borders + offset
    return edges.float()
