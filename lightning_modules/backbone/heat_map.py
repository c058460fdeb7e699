"""Heat-maps: what each visual token of a picture is worth, spread over the picture.

Notation: K concepts, P visual tokens of one picture, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from .model import VisionLanguageModel
from .patch_grid import PatchGrid
from .selectors import Selector

# Share of a patch by which the edges of a tile, which are measured, may miss the last pixels of the picture.
_SLACK = 0.05


def visual_states(
    backbone: VisionLanguageModel, pictures: Sequence[Image.Image], prompts: Sequence[str], site: str
) -> list[Tensor]:
    """States of the visual tokens, from one pass over a batch.

    In a causal model they do not depend on the answer, so only one token of it is generated.

    Args:
        backbone: The model.
        pictures: B pictures.
        prompts: What is asked about each.
        site: Where to read.

    Returns:
        States [P, D] of each picture in float32 on the CPU; P may differ between pictures.

    Raises:
        ValueError: The site is none, or has no state for each visual token, or the model has no visual tokens.
    """
    if reason := backbone.structure.without_visual_tokens:
        raise ValueError(f"{backbone.source} has no visual tokens to read: {reason}")
    inputs = {name: value.to(backbone.model.device) for name, value in backbone.encode(pictures, prompts).items()}
    (place,) = backbone.sites([site])
    generation = backbone.generate(inputs, 1, [place])
    rows = generation.select(Selector.parse("image"), backbone.vocabulary)
    counts = torch.tensor(rows.samples).bincount(minlength=len(pictures)).tolist()
    return list(torch.split_with_sizes(rows.states[place.name].float().cpu(), counts))


def heat_map(values: Tensor, grid: PatchGrid, picture: tuple[int, int], size: tuple[int, int] | None = None) -> Tensor:
    """Spread values of visual tokens over their picture.

    Within a tile values are interpolated linearly between the centres of patches, so they never leave the range of
    what is given; beyond the outermost centres they stay level. Where tiles overlap, their mean counts. What lies
    outside the picture (padding) is cut off.

    Args:
        values: Value of each visual token [K, P].
        grid: Where the tokens lie.
        picture: Width and height of the picture in pixels.
        size: Width and height of the map; as large as the picture by default.

    Returns:
        Maps [K, height, width]; not a number where the model sees nothing of the picture (cropped away).

    Raises:
        ValueError: There is not one value for each token of the grid.
    """
    if values.shape[1] != len(grid.boxes):
        raise ValueError(f"{values.shape[1]} values for a picture of {len(grid.boxes)} visual tokens; use all of them")
    width, height = size or picture
    total = values.new_zeros(len(values), height, width)
    covered = values.new_zeros(height, width)
    for tile in sorted(set(grid.tile.tolist()) - {-1}):
        here = grid.tile == tile
        rows, columns = int(grid.row[here].max()) + 1, int(grid.column[here].max()) + 1
        left, top = (grid.boxes[here, :2].amin(dim=0)).tolist()
        right, bottom = (grid.boxes[here, 2:].amax(dim=0)).tolist()
        across, seen_across = _interpolation(left, right, columns, picture[0], width)
        down, seen_down = _interpolation(top, bottom, rows, picture[1], height)
        cells = values.new_zeros(len(values), rows, columns)
        cells[:, grid.row[here], grid.column[here]] = values[:, here]
        total += torch.einsum("yr,krc,xc->kyx", down, cells, across)
        covered += seen_down[:, None] * seen_across
    return total / torch.where(covered > 0, covered, torch.nan)


def _interpolation(start: float, end: float, cells: int, length: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Weights [pixels, cells] of a tile's patches along one side, zero outside the tile, and where it is [pixels].

    Args:
        start: Where the tile starts in the picture.
        end: Where it ends.
        cells: Patches along the side.
        length: Length of the picture's side in the same unit.
        pixels: Pixels of the map along the side.
    """
    centres = (torch.arange(pixels) + 0.5) * length / pixels
    at = (centres - start) / (end - start) * cells
    inside = ((at >= -_SLACK) & (at <= cells + _SLACK)).float()
    distance = (at - 0.5).clamp(0, cells - 1)[:, None] - torch.arange(cells)
    return (1 - distance.abs()).clamp(min=0) * inside[:, None], inside
