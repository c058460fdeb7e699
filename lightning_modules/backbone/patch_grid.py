"""Where the visual tokens of a picture lie in it: their tiles, rows, columns and boxes.

Notation: P visual tokens; the numbers are those that the processor makes of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
from torch import Tensor

# Near the ends of the scale resampling overshoots and is clipped.
_LOW, _HIGH = 8 / 255, 247 / 255
# Share of a side by which coordinates may miss a straight line.
_STRAIGHT = 0.02


@dataclass(frozen=True)
class PatchGrid:
    """The visual tokens of one picture, in the order of their positions.

    A token that covers nothing, such as one that ends a row, has tile, row and column −1 and an empty box.

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


@dataclass(frozen=True)
class Scale:
    """Where the numbers of a picture lie along one side: place = slope · index + offset.

    Attributes:
        indices: Index of every number [numbers]: its column (or row) in its crop where these are known, else its place
            itself.
        slope: Of each crop [crops].
        offset: Of each crop [crops]; not a number in a crop of padding alone.
    """

    indices: Tensor
    slope: Tensor
    offset: Tensor

    @classmethod
    def of(cls, places: Tensor, axis: int, length: int) -> Scale:
        """Fit a line to the places along one side of every crop.

        Resizing, cropping and padding are affine, so it holds for the whole side, and over padding.

        Args:
            places: Place of every number, arranged as the processor does; not a number in padding.
            axis: −1 for columns, −2 for rows.
            length: Length of that side of the picture.
        """
        crops = crop_numbers(places.shape)
        count = int(crops.max()) + 1
        own = cls(places.flatten(), torch.ones(count).double(), torch.zeros(count).double())
        if _has_channels(places.shape):
            cells = places.flatten(0, -4).movedim(1, -1)
        elif places.ndim >= 3 and (side := isqrt(places.shape[-2])) ** 2 == places.shape[-2]:
            cells = places.reshape(-1, side, side, places.shape[-1])
        else:
            return own
        # [crops, rows, columns, channels or pixels of a patch] → what is known along the side [crops, cells].
        lines = cells.nanmean(dim=(1 if axis == -1 else 2, 3))
        known = lines.isfinite()
        clear = known & (lines > _LOW * length) & (lines < _HIGH * length)
        known = torch.where(clear.sum(dim=1, keepdim=True) > 1, clear, known)
        slope, offset = (torch.stack(one) for one in zip(*map(_line, lines, known), strict=True))
        steps = torch.arange(lines.shape[1])
        missed = (slope[:, None] * steps + offset[:, None] - lines)[known].abs()
        if not bool((missed < _STRAIGHT * length).all()):
            return own
        indices = (steps[:, None] if axis == -1 else steps[:, None, None]).double().expand_as(cells)
        if _has_channels(places.shape):
            indices = indices.movedim(-1, 1)
        return cls(indices.flatten(), slope, offset)


def _line(values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset of the line through the known ones of equally spaced values [cells]."""
    if int(known.sum()) < 2:
        return values.new_zeros(()), values.new_tensor(torch.nan)
    steps = torch.arange(len(values), dtype=values.dtype)
    design = torch.stack([steps, torch.ones_like(steps)], dim=1)
    slope, offset = torch.linalg.lstsq(design[known], values[known, None]).solution[:, 0]
    return slope, offset


def crop_numbers(shape: torch.Size) -> Tensor:
    """Number of the crop of every number of a picture [numbers]."""
    inner = 3 if _has_channels(shape) else min(len(shape), 2)
    return torch.arange(int(np.prod(shape))) // int(np.prod(shape[-inner:]))


def _has_channels(shape: torch.Size) -> bool:
    """Whether a processor's numbers are crops [..., 3, height, width], and not patches laid flat."""
    return len(shape) >= 4 and shape[-3] == 3


def tile_numbers(weights: Tensor, crops: Tensor) -> Tensor:
    """Number of the tile of each crop [crops]: tokens that are made of several crops join them.

    Args:
        weights: Sparse [P, numbers].
        crops: Number of the crop of every number [numbers].
    """
    token, number = weights.indices()
    tiles = torch.arange(int(crops.max()) + 1)
    if len(tiles) >= weights.shape[0]:  # these are patches, not crops
        return torch.zeros_like(tiles)
    pairs = torch.full((2, weights.shape[0]), -1)
    pairs[0].scatter_reduce_(0, token, crops[number], "amin", include_self=False)
    pairs[1].scatter_reduce_(0, token, crops[number], "amax", include_self=False)
    for first, last in sorted(set(zip(*pairs.tolist(), strict=True))):
        if first >= 0 and tiles[first] != tiles[last]:
            tiles[tiles == tiles[last]] = tiles[first].clone()
    return tiles


def arranged(weights: Tensor, across: Scale, down: Scale, tiles: Tensor) -> PatchGrid:
    """Arrange tokens by where the numbers that they are made of lie.

    Args:
        weights: Sparse [P, numbers].
        across: Columns of the numbers.
        down: Their rows.
        tiles: Number of the tile of each crop [crops]; numbers are in the order of crops.
    """
    (token, number), weight = weights.indices(), weights.values().double()
    count = weights.shape[0]
    tile = torch.full((count,), -1).scatter_reduce(0, token, tiles[number * len(tiles) // weights.shape[1]], "amax")
    weight = torch.where((across.indices + down.indices)[number].isfinite(), weight, 0)
    total = weight.new_zeros(count).index_add(0, token, weight)
    tile = torch.where(total > 0, tile, -1)
    row, column = torch.full_like(tile, -1), torch.full_like(tile, -1)
    boxes = torch.zeros(count, 4, dtype=torch.double)
    for cell, scale, left, right in ((column, across, 0, 2), (row, down, 1, 3)):
        here = scale.indices[number].nan_to_num()
        mean = weight.new_zeros(count).index_add(0, token, weight * here) / total
        variance = weight.new_zeros(count).index_add(0, token, weight * (here - mean[token]) ** 2) / total
        for one in sorted(set(tile.tolist()) - {-1}):
            inside = tile == one
            cell[inside], edges = _cells(mean[inside], (12 * variance[inside]).sqrt())
            slope, offset = (value[min(one, len(value) - 1)] for value in (scale.slope, scale.offset))
            edges = slope * edges + offset
            boxes[inside, left], boxes[inside, right] = edges[cell[inside]], edges[cell[inside] + 1]
    return PatchGrid(tile, row, column, boxes.nan_to_num().float())


def _cells(centres: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Number the columns (or rows) that tokens form, and find the borders between them.

    Args:
        centres: Where each token of a tile lies along a side [P].
        sizes: About how long it is [P].

    Returns:
        Number of the cell of each token [P]; borders [cells + 1].
    """
    ordered, order = centres.sort()
    gaps = ordered.diff()
    # Tokens of one column differ by rounding only.
    apart = gaps > max(0.1 * float(sizes.median()), 0.2 * float(gaps.max()) if len(gaps) else 0.0, 1e-6)
    ranks = torch.cat([torch.zeros(1, dtype=torch.long), apart.cumsum(0)])
    cell = torch.empty_like(order).scatter(0, order, ranks)
    middles = centres.new_zeros(int(ranks[-1]) + 1).index_add(0, cell, centres) / cell.bincount()
    if len(middles) == 1:
        return cell, torch.cat([middles - sizes.median() / 2, middles + sizes.median() / 2])
    borders = (middles[1:] + middles[:-1]) / 2
    return cell, torch.cat([2 * middles[:1] - borders[:1], borders, 2 * middles[-1:] - borders[-1:]])
