"""Which part of the original picture each visual token covers, found by asking the model and its own processor.

Processors resize, crop, pad, tile and reorder in many ways, and models merge, shuffle and unpad what they are given.
Rather than repeat their arithmetic, both are asked. The processor: pictures whose colors are their coordinates say
where every number that it gives out came from. The model: a gradient says which of these numbers a visual token is
made of, when the blocks of the vision tower, which mix all patches, are passed by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .hooks import replace_state
from .patch_grid import PatchGrid, Scale, arranged, crop_numbers, tile_numbers
from .structure import Structure

# A number of the picture is shared by tokens if its gradient changes by this share; so many may be, by chance.
_MIXED, _MANY = 0.05, 0.02
# Numbers that tell where a token is which shares them with others.
_LARGEST = 16384
# Tokens of fewer may well be made of the whole picture each.
_FEW = 4


class PatchFinder:
    """Finds the patches of pictures of any size for one model.

    Args:
        structure: The model's parts.
        encode: Makes the model's inputs of a picture, on the model's device.
        image_token_id: Id of the token that stands for one visual token.
    """

    def __init__(
        self, structure: Structure, encode: Callable[[Image.Image], dict[str, Tensor]], image_token_id: int | None
    ) -> None:
        self.structure = structure
        self.encode = encode
        self.image_token_id = -1 if image_token_id is None else image_token_id
        # Only the last: models that bring all pictures to one size need no more, and it is large.
        self._last: tuple[object, Tensor] | None = None

    def __call__(self, width: int, height: int) -> PatchGrid:
        """Find the grid of pictures of one size.

        Args:
            width: Width of the original picture in pixels, at least 2.
            height: Its height, at least 2.

        Raises:
            ValueError: Every visual token is made of the whole picture, or the model is given no pixels.
        """
        # Tensors that a gradient can be taken of, whatever surrounds this.
        with torch.inference_mode(False), torch.enable_grad():
            across, down = (self.encode(_coordinates(width, height, axis)) for axis in (0, 1))
            black, white = (self.encode(Image.new("RGB", (width, height), color)) for color in ("black", "white"))
            name = self._name_of_pixels(black, white)
            # What is padding is the same in both; all else is brought to shares of the picture's sides.
            span = white[name].double() - black[name].double()
            span = torch.where(span.abs() > 0.1 * span.abs().max(), span, torch.nan)
            x, y = (((given[name].double() - black[name].double()) / span).cpu() for given in (across, down))
            # What a token is made of does not depend on the picture's content.
            others = tuple(value.cpu().double().numpy().tobytes() for other, value in across.items() if other != name)
            if self._last is None or self._last[0] != (x.shape, others):
                self._last = (x.shape, others), self._contributions(across, name).cpu()
        weights = self._last[1]
        x, y = x * (width - 1) + 0.5, y * (height - 1) + 0.5
        tiles = tile_numbers(weights, crop_numbers(x.shape))
        if not bool((tiles == torch.arange(len(tiles))).all()):  # coordinates within crops mean nothing across them
            x, y = x.flatten(), y.flatten()
        return arranged(weights, Scale.of(x, -1, width), Scale.of(y, -2, height), tiles)

    def _name_of_pixels(self, black: dict[str, Tensor], white: dict[str, Tensor]) -> str:
        for name, value in black.items():
            if value.is_floating_point() and value.shape == white[name].shape and not torch.equal(value, white[name]):
                return name
        raise ValueError(f"{self._model}: a black and a white picture give the same inputs; patches cannot be placed")

    def _contributions(self, inputs: dict[str, Tensor], name: str) -> Tensor:
        """Which numbers of the picture each visual token is made of: sparse weights [P, numbers]."""
        pixels = inputs[name].detach().clone().requires_grad_()
        with _passing_by_blocks(self.structure):
            states = self._visual_tokens({**inputs, name: pixels})
        # One number a token, along a random direction, so that nothing of its state is missed.
        direction = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0))
        tokens = states.float() @ direction.to(states.device)
        gradient: Any = torch.autograd.grad(tokens.sum(), pixels, retain_graph=True, allow_unused=True)[0]
        if gradient is None:
            regular = _regular(len(states), pixels.shape)
            if regular is None:
                raise ValueError(
                    f"{self._model}: {len(states)} visual tokens do not divide into crops of "
                    f"{' x '.join(map(str, pixels.shape[-2:]))} pixels; patches cannot be placed"
                )
            return regular
        found = _by_codes(tokens, pixels, gradient)
        return found if found is not None else _evened(_one_by_one(tokens, pixels, self._model), pixels.shape)

    def _visual_tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        """What the language model is given at the image positions [P, D]."""

        def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        handle = self.structure.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        states = torch.empty(0)
        try:
            self.structure.model(**inputs)
        except _Reached as reached:
            states = reached.args[0]
        finally:
            handle.remove()
        return states[torch.eq(inputs["input_ids"], self.image_token_id)]

    @property
    def _model(self) -> str:
        return type(self.structure.model).__name__


class _Reached(Exception):
    """The first block of the language model is reached; its only argument is what goes into it."""


@contextmanager
def _passing_by_blocks(structure: Structure) -> Iterator[None]:
    """Within the context the blocks of the vision tower return what they are given."""
    encoder = structure.image_encoder
    lists = [] if encoder is None else [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    with ExitStack() as stack:
        for block in (block for blocks in lists for block in blocks):
            stack.enter_context(patch.object(block, "forward", _passed_by(block.forward)))
        yield


def _passed_by(forward: Callable[..., Any]) -> Callable[..., Any]:
    def identity(*args: Any, **kwargs: Any) -> Any:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        # Run once for the form of what it returns.
        with torch.no_grad():
            output = forward(*args, **kwargs)
        state = output[0] if isinstance(output, tuple) else output
        if given is None or not isinstance(state, Tensor) or state.shape != given.shape:
            return forward(*args, **kwargs)
        return replace_state(output, given)

    return identity


def _by_codes(tokens: Tensor, pixels: Tensor, plain: Tensor) -> Tensor | None:
    """Find the one token that each number is part of, from a handful of gradients; nothing where numbers are shared.

    The number of a token is written in binary into the signs of a sum over tokens: where the gradient of a number of
    the picture changes its sign, its token has that digit.

    Args:
        tokens: A number of each token [P].
        pixels: The numbers of the picture.
        plain: Gradient of the sum of `tokens`.
    """
    numbers = torch.arange(len(tokens), device=tokens.device)
    owner = torch.zeros_like(plain, dtype=torch.long)
    shared = torch.zeros_like(plain, dtype=torch.bool)
    for digit in range(max(len(tokens) - 1, 0).bit_length()):
        has = numbers >> digit & 1
        (coded,) = torch.autograd.grad((tokens * (1 - 2 * has)).sum(), pixels, retain_graph=True)
        owner |= ((coded < 0) != (plain < 0)).long() << digit
        shared |= (coded.abs() - plain.abs()).abs() > _MIXED * plain.abs()
    used = plain != 0
    if not used.any() or float((shared & used).sum() / used.sum()) > _MANY:
        return None
    entries = (used & ~shared).flatten().nonzero().flatten()
    indices = torch.stack([owner.flatten()[entries], entries])
    return _sparse(indices, torch.ones(len(entries)), (len(tokens), pixels.numel()))


def _one_by_one(tokens: Tensor, pixels: Tensor, model: str) -> Tensor:
    """Weigh the numbers that each token is made of by their gradients, where neighbours share numbers.

    Raises:
        ValueError: Most tokens share most numbers.
    """
    rows, sharing = [], torch.zeros(pixels.numel(), device=pixels.device)
    for token in tokens:
        (gradient,) = torch.autograd.grad(token, pixels, retain_graph=True)
        weight = gradient.flatten().float().square()
        sharing += weight != 0
        rows.append(weight.topk(min(_LARGEST, len(weight))))
    if len(rows) >= _FEW and float(sharing[sharing > 0].mean()) > len(rows) / 2:
        raise ValueError(
            f"{model}: every visual token is made of the whole picture (by a resampler), and covers no part of it"
        )
    owners = torch.arange(len(rows), device=pixels.device).repeat_interleave(len(rows[0].indices))
    indices = torch.stack([owners, torch.cat([row.indices for row in rows])])
    values = torch.cat([row.values for row in rows])
    indices, values = indices[:, values > 0], values[values > 0]
    return _sparse(indices, values, (len(tokens), pixels.numel()))


def _evened(weights: Tensor, shape: torch.Size) -> Tensor:
    """Rows of square patches in place of patches that reach over their neighbours, where these lie like that."""
    regular = _regular(weights.shape[0], shape)
    if regular is None:
        return weights
    *_, height, width = shape
    places = []
    for found in (weights, regular):
        (token, number), weight = found.cpu().indices(), found.cpu().values()
        crop, row, column = number // (3 * height * width), number // width % height, number % width
        total = weight.new_zeros(found.shape[0]).index_add(0, token, weight)
        sums = [weight.new_zeros(len(total)).index_add(0, token, weight * at) for at in (crop, row, column)]
        places.append(torch.stack(sums) / total)
    cell = torch.tensor([1e-3, *(2 * side / len(places[0][0]) ** 0.5 for side in (height, width))])
    return regular if bool(((places[0] - places[1]).abs() < cell[:, None]).all()) else weights


def _regular(tokens: int, shape: torch.Size) -> Tensor | None:
    """Rows of square patches in every crop [..., 3, height, width], as many as tokens; nothing if none fit."""
    if len(shape) < 4:
        return None
    *_, height, width = shape
    crops = int(np.prod(shape[:-3]))
    columns = round((tokens / crops * width / height) ** 0.5)
    rows = tokens // crops // max(columns, 1)
    if rows * columns * crops != tokens:
        return None
    row = torch.arange(height) * rows // height
    column = torch.arange(width) * columns // width
    crop = torch.arange(crops)[:, None, None, None]
    owner = (crop * rows * columns + row[:, None] * columns + column).expand(-1, shape[-3], -1, -1).flatten()
    indices = torch.stack([owner, torch.arange(len(owner))])
    return _sparse(indices, torch.ones(len(owner)), (tokens, len(owner)))


def _sparse(indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    # Without being told to check or not, torch warns of crashes.
    return torch.sparse_coo_tensor(indices, values.to(indices.device), shape, check_invariants=False).coalesce()


def _coordinates(width: int, height: int, axis: int) -> Image.Image:
    """A picture whose gray is the column (axis 0) or the row (axis 1), from black to white."""
    # Shifts of up to half a level along the other side, so that rounding to levels averages out over a line.
    across, along = (width, height) if axis == 0 else (height, width)
    shifts = np.linspace(0, 8, along, endpoint=False) % 1 - 0.5
    levels = (np.linspace(0, 255, across)[None, :] + shifts[:, None]).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels if axis == 0 else levels.T.copy()).convert("RGB")
