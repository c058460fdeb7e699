"""Sets of visual tokens, against loops over patches and pixels."""

from __future__ import annotations

import numpy as np
import torch
from conceptshift.lightning_modules.backbone.patch_grid import PatchGrid
from conceptshift.lightning_modules.backbone.visual_sets import (
    coverage,
    grown,
    last_row,
    object_tokens,
    random_tokens,
    registers,
    top_tokens,
)


def grid_of(rows: int, columns: int, width: float, height: float, tile: int = 0) -> PatchGrid:
    """A picture of `width` x `height` pixels, in equal patches."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    row, column = row.flatten(), column.flatten()
    cell = torch.tensor([width / columns, height / rows] * 2)
    boxes = torch.stack([column, row, column + 1, row + 1], dim=1) * cell
    return PatchGrid(torch.full_like(row, tile), row, column, boxes)


def joined(*grids: PatchGrid) -> PatchGrid:
    """Several tiles after each other, with a token between them that covers nothing."""
    nothing = PatchGrid(torch.tensor([-1]), torch.tensor([-1]), torch.tensor([-1]), torch.zeros(1, 4))
    parts = [part for grid in grids for part in (grid, nothing)][:-1]
    return PatchGrid(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("tile", "row", "column", "boxes"))
    )


def test_coverage_counts_pixels() -> None:
    mask = np.random.default_rng(0).random((30, 48)) < 0.3
    grid = grid_of(3, 4, 48, 30)
    expected = [mask[10 * r : 10 * r + 10, 12 * c : 12 * c + 12].mean() for r in range(3) for c in range(4)]
    torch.testing.assert_close(coverage(grid, mask), torch.tensor(expected).float())


def test_an_object_of_one_pixel_is_in_one_patch_though_edges_are_measured() -> None:
    mask = np.zeros((40, 40), dtype=bool)
    mask[19, 20] = True
    grid = grid_of(4, 4, 40, 40)
    measured = PatchGrid(grid.tile, grid.row, grid.column, grid.boxes + torch.tensor([-0.4, 0.3, 0.4, -0.3]))
    for one in (grid, measured):
        assert object_tokens(one, mask).nonzero().flatten().tolist() == [1 * 4 + 2]


def test_what_the_processor_pads_or_crops_holds_no_object() -> None:
    mask = np.ones((20, 40), dtype=bool)
    grid = grid_of(4, 4, 40, 40)  # the lower half is padding
    assert coverage(grid, mask).reshape(4, 4).tolist() == [[1.0] * 4] * 2 + [[0.0] * 4] * 2
    cropped = PatchGrid(grid.tile, grid.row, grid.column, grid.boxes * 0.5)
    far = np.zeros((40, 40), dtype=bool)
    far[30:, 30:] = True
    assert not object_tokens(cropped, far).any()


def test_rings_are_neighbours_within_a_tile() -> None:
    grid = joined(grid_of(5, 6, 60, 50, tile=0), grid_of(3, 3, 60, 50, tile=1))
    chosen = torch.zeros(len(grid.tile), dtype=torch.bool)
    chosen[0] = chosen[3 * 6 + 2] = True
    for rings in (0, 1, 2):
        expected = [
            int(tile) == 0 and min(max(abs(int(row) - r), abs(int(column) - c)) for r, c in ((0, 0), (3, 2))) <= rings
            for tile, row, column in zip(grid.tile, grid.row, grid.column, strict=True)
        ]
        assert grown(grid, chosen, rings).tolist() == expected
    assert chosen.sum() == 2


def test_the_last_row_is_that_of_the_last_tile() -> None:
    assert last_row(grid_of(3, 4, 8, 6)).nonzero().flatten().tolist() == [8, 9, 10, 11]
    both = joined(grid_of(3, 4, 8, 6, tile=0), grid_of(2, 2, 8, 6, tile=1))
    assert last_row(both).nonzero().flatten().tolist() == [15, 16]


def test_registers_are_longer_than_two_deviations() -> None:
    states = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    states[[3, 17]] *= 20
    assert registers(states).nonzero().flatten().tolist() == [3, 17]
    lengths = states.norm(dim=1).numpy()
    assert registers(states).tolist() == (lengths > lengths.mean() + 2 * lengths.std()).tolist()


def test_deviations_are_those_of_all_tokens() -> None:
    """Of the six of this picture the last is 2.11 deviations longer; of a sample of more it would be 1.93."""
    states = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 4.0]))
    assert registers(states).tolist() == [False] * 5 + [True]


def test_random_sets_are_nested_and_of_their_seed() -> None:
    small, large = random_tokens(64, 5, "a"), random_tokens(64, 20, "a")
    assert (int(small.sum()), int(large.sum())) == (5, 20)
    assert not (small & ~large).any()
    assert torch.equal(random_tokens(64, 20, "a"), large)
    assert not torch.equal(random_tokens(64, 20, "b"), large)
    drawn = torch.stack([random_tokens(16, 4, str(draw)) for draw in range(2000)])
    assert (drawn.float().mean(dim=0) - 0.25).abs().max() < 0.05


def test_top_tokens_take_the_first_of_equals() -> None:
    assert top_tokens(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 2).tolist() == [False, True, True, False, False]
