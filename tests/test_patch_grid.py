"""Visual tokens lie in the original picture where the processor's own arithmetic puts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone.patch_grid import find_patch_grid
from conceptshift.lightning_modules.backbone.token_map import Role, TokenMap
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

SIDE, CELLS = 64, 8


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 64), (640, 480), (427, 640), (50, 333)])
def test_resize_and_centre_crop(width: int, height: int) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    grid = find_patch_grid(processor, width, height, CELLS**2)
    short = min(width, height)
    # The longer side is cropped: what is left of it is centred, up to one pixel of the resized picture.
    pixel = short / SIDE
    left, top = (width - short) / 2, (height - short) / 2
    cell = short / CELLS
    expected = torch.stack(
        [
            left + cell * grid.column,
            top + cell * grid.row,
            left + cell * (grid.column + 1),
            top + cell * (grid.row + 1),
        ],
        dim=1,
    )
    assert (grid.boxes - expected).abs().max() <= 1.02 * pixel
    assert grid.row.tolist() == [row for row in range(CELLS) for _ in range(CELLS)]
    assert grid.column.tolist() == list(range(CELLS)) * CELLS
    assert set(grid.tile.tolist()) == {0}


def test_stretched_to_a_square() -> None:
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    grid = find_patch_grid(processor, 320, 96, CELLS**2)
    torch.testing.assert_close(grid.boxes[0], torch.tensor([0.0, 0.0, 40.0, 12.0]), atol=0.5, rtol=0)
    torch.testing.assert_close(grid.boxes[-1], torch.tensor([280.0, 84.0, 320.0, 96.0]), atol=0.5, rtol=0)


def test_tokens_that_form_no_grid_are_an_error() -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    with pytest.raises(ValueError, match="63 visual tokens do not divide"):
        find_patch_grid(processor, SIDE, SIDE, 63)


def test_the_model_counts_its_own_tokens(tiny: Path) -> None:
    model = VisionLanguageModel.load(str(tiny))
    grid = model.patch_grid(100, 100)
    assert len(grid.boxes) == (grid.row.max() + 1) * (grid.column.max() + 1)
    torch.testing.assert_close(grid.boxes[-1, 2:], torch.tensor([100.0, 100.0]), atol=0.5, rtol=0)


def test_image_index_counts_visual_tokens() -> None:
    roles = torch.tensor([[Role.PAD, Role.SPECIAL, Role.IMAGE, Role.IMAGE, Role.PROMPT, Role.ANSWER]])
    token_map = TokenMap(torch.zeros_like(roles), roles, torch.tensor([5]), [[0]], [[]])
    assert token_map.image_index.tolist() == [[-1, -1, 0, 1, -1, -1]]
