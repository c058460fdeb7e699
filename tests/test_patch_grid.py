"""Visual tokens lie in the original picture where the processor's own arithmetic puts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone.patch_grid import PatchGrid
from conceptshift.lightning_modules.backbone.token_map import Role, TokenMap
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

SIDE, CELLS = 64, 8


def grid_with(backbone: VisionLanguageModel, processor: Any, width: int, height: int) -> PatchGrid:
    """The grid of the tiny model, given pictures by another image processor."""
    backbone.processor.image_processor = processor
    return VisionLanguageModel(backbone.model, backbone.processor, "tiny").patch_grid(width, height)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 64), (640, 480), (427, 640), (50, 333)])
def test_resize_and_centre_crop(backbone: VisionLanguageModel, width: int, height: int) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    grid = grid_with(backbone, processor, width, height)
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


def test_stretched_to_a_square(backbone: VisionLanguageModel) -> None:
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    grid = grid_with(backbone, processor, 320, 96)
    torch.testing.assert_close(grid.boxes[0], torch.tensor([0.0, 0.0, 40.0, 12.0]), atol=0.5, rtol=0)
    torch.testing.assert_close(grid.boxes[-1], torch.tensor([280.0, 84.0, 320.0, 96.0]), atol=0.5, rtol=0)


class _Padding(ViTImageProcessorPil):
    """Keeps the shape of a picture and pads it to a square with gray, on the right and below."""

    def preprocess(self, images: Any, **options: Any) -> Any:
        flat = [image for one in images for image in (one if isinstance(one, list) else [one])]
        squares = []
        for image in flat:
            square = image.resize((1, 1)).convert("RGB").resize((max(image.size),) * 2)
            square.paste((128, 128, 128), (0, 0, *square.size))
            square.paste(image, (0, 0))
            squares.append(square)
        return super().preprocess(squares, **options)


def test_boxes_go_on_over_padding(backbone: VisionLanguageModel) -> None:
    grid = grid_with(backbone, _Padding(size={"height": SIDE, "width": SIDE}), 160, 80)
    cell = 160 / CELLS
    expected = torch.stack([grid.column, grid.row, grid.column + 1, grid.row + 1], dim=1) * cell
    torch.testing.assert_close(grid.boxes, expected.float(), atol=0.5, rtol=0)
    assert int(grid.row.max()) == CELLS - 1


def test_the_model_counts_its_own_tokens(shared_backbone: VisionLanguageModel) -> None:
    grid = shared_backbone.patch_grid(100, 100)
    assert len(grid.boxes) == (grid.row.max() + 1) * (grid.column.max() + 1)
    torch.testing.assert_close(grid.boxes[-1, 2:], torch.tensor([100.0, 100.0]), atol=0.5, rtol=0)


def test_found_within_inference_and_leaves_the_model_as_it_was(backbone: VisionLanguageModel) -> None:
    inputs = backbone.encode([Image.new("RGB", (90, 60), "gray")], ["What is it?"])
    before = backbone.logits(inputs)
    with torch.inference_mode():
        grid = backbone.patch_grid(90, 60)
    assert torch.equal(backbone.logits(inputs), before)
    assert set(grid.tile.tolist()) == {0}
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_image_index_counts_visual_tokens() -> None:
    roles = torch.tensor([[Role.PAD, Role.SPECIAL, Role.IMAGE, Role.IMAGE, Role.PROMPT, Role.ANSWER]])
    token_map = TokenMap(torch.zeros_like(roles), roles, torch.tensor([5]), [[0]], [[]])
    assert token_map.image_index.tolist() == [[-1, -1, 0, 1, -1, -1]]
