"""Names of token sets, windows and knockouts: what they mean for models of any depth, and for one picture."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone.interventions import Steering
from conceptshift.lightning_modules.backbone.knockout import AttentionKnockout, changed
from conceptshift.lightning_modules.backbone.knockout_names import KnockoutName, TokenSet, positions, resolve
from conceptshift.lightning_modules.backbone.patch_grid import PatchGrid
from conceptshift.lightning_modules.backbone.prompts import append_answers, prompts_only
from PIL import Image
from torch import Tensor

WINDOWS = ("early", "early-mid", "mid", "mid-late", "late", "all")


@pytest.fixture
def grid() -> PatchGrid:
    """4 x 4 patches of 10 pixels, and after each row a token that covers nothing."""
    row, column = (one.flatten() for one in torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij"))
    covers = column < 4
    boxes = 10.0 * torch.stack([column, row, column + 1, row + 1], dim=1)
    return PatchGrid(
        torch.where(covers, 0, -1),
        torch.where(covers, row, -1),
        torch.where(covers, column, -1),
        boxes * covers[:, None],
    )


@pytest.fixture
def mask() -> np.ndarray:
    """An object in the patch of row 1 and column 1, 40 x 40 pixels in all."""
    pixels = np.zeros((40, 40), dtype=bool)
    pixels[12:18, 12:18] = True
    return pixels


# --- names ----------------------------------------------------------------------------------------------


def test_windows_of_32_blocks_are_those_of_the_paper() -> None:
    published = {"early": (0, 9), "early-mid": (5, 14), "mid": (11, 20), "mid-late": (15, 24), "late": (21, 31)}
    for window, (first, last) in {**published, "all": (0, 31)}.items():
        assert list(KnockoutName.parse(f"object -> last @ {window}").blocks(32)) == list(range(first, last + 1))


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 24, 28, 40, 80])
def test_windows_scale_to_any_depth(depth: int) -> None:
    found = {window: KnockoutName.parse(f"object -> last @ {window}").blocks(depth) for window in WINDOWS}
    assert list(found["all"]) == list(range(depth))
    assert found["early"][0] == 0
    assert found["late"][-1] == depth - 1
    ordered = [found[window] for window in WINDOWS[:-1]]
    assert all(ordered)
    assert [one[0] for one in ordered] == sorted(one[0] for one in ordered)
    for window, blocks in found.items():
        published = KnockoutName.parse(f"object -> last @ {window}").blocks(32)
        assert abs(len(blocks) - len(published) * depth / 32) <= 1


def test_blocks_by_number() -> None:
    assert list(KnockoutName.parse("image->text@3-5").blocks(6)) == [3, 4, 5]
    assert list(KnockoutName.parse("image -> text @ 5").blocks(6)) == [5]
    with pytest.raises(ValueError, match=r"^knockout 'image -> text @ 3-6': the model has blocks 0–5, but no block 6$"):
        KnockoutName.parse("image -> text @ 3-6").blocks(6)


def test_sides_are_read() -> None:
    name = KnockoutName.parse("image-object+2 -> answer @ mid-late")
    assert name == KnockoutName(name.name, TokenSet("image-object+2", "image-object", 2), "answer", "mid-late")
    assert KnockoutName.parse("text -> last_row @ all").targets == TokenSet("last_row", "last_row")
    assert TokenSet.parse("gradients:40") == TokenSet("gradients:40", "gradients", 40)
    assert TokenSet.parse("object") == TokenSet("object", "object", 0)


@pytest.mark.parametrize(
    "name", ["objects", "object+", "object+0", "object+x", "image+1", "random", "random:0", "text", ""]
)
def test_unknown_sets_are_refused_with_a_list(name: str) -> None:
    expected = f"^no set of visual tokens is called '{re.escape(name)}'; there are object, .*registers.*random:N"
    with pytest.raises(ValueError, match=expected) as raised:
        TokenSet.parse(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("object -> last", "expected `sources -> targets @ window`"),
        ("object last @ all", "expected `sources -> targets @ window`"),
        ("object -> last @ middle", r"no window 'middle'; there are early, early-mid, .*3-7"),
        ("object -> last @ 7-3", "no window '7-3'"),
        ("objects -> last @ all", r"no set 'objects'; there are object, .*text, last$"),
        ("answer -> last @ all", r"no set 'answer'; there are .*, last$"),
        ("object -> first @ all", r"no set 'first'; there are object, .*text, last, answer$"),
    ],
)
def test_unknown_knockouts_are_refused_in_one_line(name: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^knockout '{re.escape(name)}': {expected}") as raised:
        KnockoutName.parse(name)
    assert "\n" not in str(raised.value)


# --- sets of one picture --------------------------------------------------------------------------------


def masked(side: TokenSet | str, inputs: dict[str, Tensor], image_token: int, chosen: list[Tensor]) -> Tensor:
    """Positions that are no selector."""
    found = positions(side, inputs, image_token, chosen)
    assert isinstance(found, Tensor)
    return found


def cells(grid: PatchGrid, chosen: Tensor) -> set[tuple[int, int]]:
    return {(int(row), int(column)) for row, column in zip(grid.row[chosen], grid.column[chosen], strict=True)}


def test_sets_of_an_object(grid: PatchGrid, mask: np.ndarray) -> None:
    rings = {(row, column) for row in range(3) for column in range(3)}
    assert cells(grid, resolve(TokenSet.parse("object"), grid, mask)) == {(1, 1)}
    assert cells(grid, resolve(TokenSet.parse("object+1"), grid, mask)) == rings
    for name in ("object", "object+1", "object+2"):
        with_it, without = (resolve(TokenSet.parse(one), grid, mask) for one in (name, f"image-{name}"))
        assert torch.equal(with_it, ~without)
    assert resolve(TokenSet.parse("image"), grid, None).all()
    assert cells(grid, resolve(TokenSet.parse("last_row"), grid, None)) == {(3, column) for column in range(4)}


def test_sets_by_value(grid: PatchGrid) -> None:
    values = torch.linspace(-1, 1, 20)
    assert resolve(TokenSet.parse("gradients:3"), grid, None, attributions=values).nonzero().flatten().tolist() == [
        17, 18, 19,
    ]  # fmt: skip
    states = torch.ones(20, 8)
    states[4] *= 50
    assert resolve(TokenSet.parse("registers"), grid, None, states=states).nonzero().flatten().tolist() == [4]


def test_random_sets_are_of_patches_and_nested(grid: PatchGrid) -> None:
    small, large, all_patches = (
        resolve(TokenSet.parse(f"random:{count}"), grid, None, seed="7") for count in (3, 9, 16)
    )
    assert small.sum() == 3
    assert (small & large).sum() == 3
    assert torch.equal(all_patches, grid.tile >= 0)
    assert not torch.equal(small, resolve(TokenSet.parse("random:3"), grid, None, seed="8"))
    with pytest.raises(ValueError, match=r"^set 'random:17': the picture has 16 visual tokens only"):
        resolve(TokenSet.parse("random:17"), grid, None)
    with pytest.raises(ValueError, match=r"^set 'gradients:21': the picture has 20 visual tokens only"):
        resolve(TokenSet.parse("gradients:21"), grid, None, attributions=torch.rand(20))


# --- positions ------------------------------------------------------------------------------------------


def test_positions_do_not_depend_on_padding_or_answers(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image]
) -> None:
    encode, image_token = shared_backbone.encode, shared_backbone.encode.image_token_id
    assert image_token is not None
    left = encode(pictures[:2], ["What?", "How many shapes are there in this picture?"])
    pad = shared_backbone.tokenizer.pad_token_id
    right = append_answers(left, [[5, 6, 7], [8]], pad, image_token)
    chosen = [torch.rand(64, generator=torch.Generator().manual_seed(row)) < 0.5 for row in range(2)]
    for side in (TokenSet.parse("random:3"), "text"):
        one, other = (masked(side, inputs, image_token, chosen) for inputs in (left, right))
        longest = min(one.shape[1], other.shape[1])
        assert torch.equal(one[:, :longest], other[:, :longest])
        assert not one[:, longest:].any()
        assert not other[:, longest:].any()
    visual, text = (masked(side, left, image_token, chosen) for side in (TokenSet.parse("image"), "text"))
    for row in range(2):
        ids = left["input_ids"][row][left["attention_mask"][row].bool()]
        last = len(ids) - 1
        assert torch.equal(visual[row, : last + 1][ids == image_token], chosen[row])
        assert visual[row].sum() == chosen[row].sum()
        assert torch.equal(text[row, : last + 1], (ids != image_token) & (torch.arange(last + 1) < last))
    assert positions("last", left, image_token) == "last_prompt"
    with pytest.raises(ValueError, match=r"^set 'image': 63 tokens for the 64 visual tokens of sample 0"):
        positions(TokenSet.parse("image"), left, image_token, [torch.ones(63).bool()] * 2)


def test_a_set_that_is_replaced_is_what_the_model_lacks(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor
) -> None:
    inputs = shared_backbone.encode(pictures[:2], ["What?", "How many shapes are there in this picture?"])
    image_token = shared_backbone.encode.image_token_id
    assert image_token is not None
    chosen = [torch.arange(64) < 5, torch.arange(64) >= 60]
    where = positions(TokenSet.parse("random:5"), inputs, image_token, chosen)
    (site,) = shared_backbone.sites(["projector"])
    with shared_backbone.intervene(Steering("projector", vector, positions=where, mode="replace")):
        generation = shared_backbone.generate(inputs, 1, [site])
    for row, tokens in enumerate(chosen):
        states = generation.states["projector"][row][inputs["input_ids"][row] == image_token]
        assert torch.equal((states == vector).all(dim=1), tokens)


# --- whether anything changed ---------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "reaches"),
    [
        ("image -> last @ 1", True),
        ("text -> last @ 2", True),
        ("image -> text @ 0-1", True),
        # What nobody may see anyway, and what nobody looks at any more.
        ("last -> image @ all", False),
        ("image -> text @ 2", False),
    ],
)
def test_knockouts_that_reach_no_logit_are_known(
    tiny: object, pictures: list[Image.Image], attention: str, name: str, reaches: bool
) -> None:
    model = VisionLanguageModel.load(str(tiny), attention=attention)
    inputs = model.encode(pictures[:2], ["What?", "How many shapes are there in this picture?"])
    image_token = model.encode.image_token_id
    assert image_token is not None
    parsed = KnockoutName.parse(name)
    everything = [torch.ones(64).bool()] * 2
    sources, targets = (positions(side, inputs, image_token, everything) for side in (parsed.sources, parsed.targets))
    (site,) = model.sites(["lm.block.2"])
    before = model.generate(inputs, 2, [site])
    with model.intervene(AttentionKnockout(sources, targets, parsed.blocks(3))):
        after = model.generate(inputs, 2, [site])
    assert changed(before, after, site.name).tolist() == [reaches, reaches]
    assert not changed(before, model.generate(prompts_only(inputs, 0), 2, [site]), site.name).any()
