"""Sets of visual tokens, chosen by where they lie in the picture or by what they hold (METHODS §5).

Notation: P visual tokens of one picture, in the order of a `PatchGrid`.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import max_pool2d

from .patch_grid import PatchGrid

# Hidden states so much longer than the others' mean, in standard deviations, are registers.
_REGISTER = 2.0


def object_tokens(grid: PatchGrid, mask: NDArray[Any]) -> Tensor:
    """Tokens whose patch overlaps an object, by however little.

    Args:
        grid: Where the tokens lie in the picture.
        mask: Where the object is [height, width], in pixels of the same picture.

    Returns:
        Boolean [P].
    """
    return coverage(grid, mask) > 0


def coverage(grid: PatchGrid, mask: NDArray[Any]) -> Tensor:
    """Share of each token's patch that an object covers [P]; what lies outside the picture counts as not covered."""
    height, width = mask.shape
    # Sums over rectangles from sums over all that is above and left.
    sums = torch.zeros(height + 1, width + 1, dtype=torch.float64)
    sums[1:, 1:] = torch.from_numpy(mask.astype("float64")).cumsum(0).cumsum(1)
    # Edges are measured, to about half a pixel: the nearest ones, but never none.
    left, top, right, bottom = grid.boxes.double().round().long().T
    right, bottom = torch.maximum(right, left + 1), torch.maximum(bottom, top + 1)
    x0, x1 = left.clamp(0, width), right.clamp(0, width)
    y0, y1 = top.clamp(0, height), bottom.clamp(0, height)
    covered = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    share = covered / ((right - left) * (bottom - top))
    return torch.where(grid.tile >= 0, share, 0.0).float()


def grown(grid: PatchGrid, tokens: Tensor, rings: int) -> Tensor:
    """A set with its neighbours, also diagonal ones, within the same tile.

    Args:
        grid: Where the tokens lie.
        tokens: The set [P].
        rings: How many times the neighbours are added.
    """
    grown_set = tokens.clone()
    for tile in sorted(set(grid.tile.tolist()) - {-1}):
        here = grid.tile == tile
        rows, columns = grid.row[here], grid.column[here]
        cells = torch.zeros(1, 1, int(rows.max()) + 1, int(columns.max()) + 1)
        cells[0, 0, rows, columns] = tokens[here].float()
        for _ in range(rings):
            cells = max_pool2d(cells, 3, stride=1, padding=1)
        grown_set[here] = cells[0, 0, rows, columns] > 0
    return grown_set


def last_row(grid: PatchGrid) -> Tensor:
    """The lowest row of visual tokens in the tile that comes last in the sequence [P]."""
    last = grid.tile == grid.tile[grid.tile >= 0][-1]
    return last & (grid.row == grid.row[last].max())


def registers(states: Tensor) -> Tensor:
    """Tokens whose hidden state is longer than the mean of their picture by more than two standard deviations [P].

    Args:
        states: Hidden states of the picture's visual tokens [P, D].
    """
    lengths = torch.linalg.vector_norm(states.float(), dim=1)
    longer: Tensor = lengths > lengths.mean() + _REGISTER * lengths.std(correction=0)
    return longer


def random_tokens(tokens: int, count: int, seed: str) -> Tensor:
    """A random set of `count` of P tokens; nested: a larger one of the same seed contains it.

    Args:
        tokens: P.
        count: Size of the set, at most P.
        seed: Names the draw, such as a sample id, so that batches and processes do not change it.
    """
    generator = torch.Generator().manual_seed(crc32(seed.encode()))
    return top_tokens(torch.rand(tokens, generator=generator), count)


def top_tokens(values: Tensor, count: int) -> Tensor:
    """The `count` tokens of highest value [P]; of equal ones the first.

    Args:
        values: A value of each token [P].
        count: Size of the set, at most P.
    """
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.cpu().sort(descending=True, stable=True).indices[:count]] = True
    return chosen
