"""Names of sets of tokens, of windows of blocks, and of knockouts such as `object+1 -> last @ mid-late` (METHODS §5).

Notation: B samples, L columns, P visual tokens of one picture in the order of a `PatchGrid`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from numpy.typing import NDArray
from torch import Tensor

from .patch_grid import PatchGrid
from .prompts import IGNORED
from .visual_sets import grown, last_row, object_tokens, random_tokens, registers, top_tokens

Kind = Literal["object", "image", "image-object", "last_row", "registers", "random", "gradients"]
_SET = re.compile(r"(?P<kind>object|image-object)(\+(?P<rings>[1-9]\d*))?|(?P<counted>random|gradients):(?P<count>\d+)")
_SETS = "object, object+K, image, image-object, image-object+K, last_row, registers, random:N, gradients:N"
# Positions that are no visual tokens, and which selector they are; of `text` there is none.
_OTHERS = {"text": None, "last": "last_prompt", "answer": "answer"}
# Blocks of 32, both included (arXiv 2410.07149, section 5).
_WINDOWS = {
    "early": (0, 9),
    "early-mid": (5, 14),
    "mid": (11, 20),
    "mid-late": (15, 24),
    "late": (21, 31),
    "all": (0, 31),
}
_DEPTH = 32
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class TokenSet:
    """A set of visual tokens by its name.

    Attributes:
        name: As it was given.
        kind: `object`: tokens whose patch overlaps the object; `image`: all; `image-object`: all but the object's;
            `last_row`: the lowest row; `registers`: of unusual length; `random`; `gradients`: of highest attribution.
        number: Rings of neighbours around the object, or how many tokens a set has that is counted.
    """

    name: str
    kind: Kind
    number: int = 0

    @classmethod
    def parse(cls, name: str) -> TokenSet:
        """Read a name.

        Raises:
            ValueError: There is no such set.
        """
        if match := _SET.fullmatch(name):
            number = int(match["rings"] or match["count"] or 0)
            if match["kind"] or number:
                return cls(name, cast(Kind, match["kind"] or match["counted"]), number)
        elif name in get_args(Kind) and name not in ("random", "gradients"):
            return cls(name, cast(Kind, name))
        raise ValueError(f"no set of visual tokens is called {name!r}; there are {_SETS} (K, N at least 1)")


@dataclass(frozen=True)
class KnockoutName:
    """Who may not attend to whom, and in which window of blocks: `sources -> targets @ window`.

    Attributes:
        name: As it was given.
        sources: Visual tokens, or `text`, `last`.
        targets: Visual tokens, or `text`, `last`, `answer`.
        window: `early`, `early-mid`, `mid`, `mid-late`, `late`, `all`, or numbers of blocks: `5`, `3-7`.
    """

    name: str
    sources: TokenSet | str
    targets: TokenSet | str
    window: str

    @classmethod
    def parse(cls, name: str) -> KnockoutName:
        """Read a name. Spaces around `->` and `@` do not matter.

        Raises:
            ValueError: It has another form, or names a set or window that there is not.
        """
        match = re.fullmatch(r"\s*(\S+?)\s*->\s*(\S+?)\s*@\s*(\S+)\s*", name)
        if match is None:
            raise ValueError(
                f"knockout {name!r}: expected `sources -> targets @ window`, such as 'object+1 -> last @ mid-late'"
            )
        sources, targets, window = match.groups()
        bounds = _RANGE.fullmatch(window)
        if window not in _WINDOWS and (bounds is None or int(bounds[2] or bounds[1]) < int(bounds[1])):
            raise ValueError(
                f"knockout {name!r}: no window {window!r}; there are {', '.join(_WINDOWS)}, a block such as 5, and "
                "blocks such as 3-7, both included"
            )
        # What follows the prompt is seen by nobody before it.
        known = [other for other in _OTHERS if other != "answer"]
        return cls(name, _side(name, sources, known), _side(name, targets, list(_OTHERS)), window)

    def blocks(self, count: int) -> range:
        """Numbers of the blocks of its window.

        A named window is that of 32 blocks, scaled, and never empty.

        Args:
            count: Blocks of the language model.

        Raises:
            ValueError: The model has no such block.
        """
        if self.window in _WINDOWS:
            first, last = _WINDOWS[self.window]
            start = min(round(first * count / _DEPTH), count - 1)
            return range(start, max(round((last + 1) * count / _DEPTH), start + 1))
        first, *rest = (int(number) for number in self.window.split("-"))
        stop = (rest or [first])[0] + 1
        if stop > count:
            raise ValueError(f"knockout {self.name!r}: the model has blocks 0–{count - 1}, but no block {stop - 1}")
        return range(first, stop)


def _side(knockout: str, name: str, others: list[str]) -> TokenSet | str:
    try:
        return name if name in others else TokenSet.parse(name)
    except ValueError as error:
        raise ValueError(f"knockout {knockout!r}: no set {name!r}; there are {_SETS}, {', '.join(others)}") from error


def resolve(
    token_set: TokenSet,
    grid: PatchGrid,
    mask: NDArray[Any] | None,
    *,
    states: Tensor | None = None,
    attributions: Tensor | None = None,
    seed: str = "",
) -> Tensor:
    """The tokens of one picture that are in a set.

    Args:
        token_set: Which set.
        grid: Where the picture's tokens lie.
        mask: Where the object is [height, width], in pixels of the picture; for sets that know of an object.
        states: Hidden states of the picture's visual tokens [P, D]; for `registers`.
        attributions: A value of each token [P]; for `gradients`.
        seed: Names the draw of `random`, such as a sample id.

    Returns:
        Boolean [P].

    Raises:
        ValueError: The set is to be larger than the picture has tokens.
    """
    patches = grid.tile >= 0
    # A token that ends a row is part of the picture, but of no patch: no chance draws it.
    there = int(patches.sum()) if token_set.kind == "random" else len(patches)
    if token_set.kind in ("random", "gradients") and token_set.number > there:
        raise ValueError(f"set {token_set.name!r}: the picture has {there} visual tokens only; name a smaller set")
    match token_set.kind:
        case "object" | "image-object":
            assert mask is not None, "a set that knows of an object needs its mask"
            chosen = grown(grid, object_tokens(grid, mask), token_set.number)
            return chosen if token_set.kind == "object" else ~chosen
        case "image":
            return torch.ones_like(patches)
        case "last_row":
            return last_row(grid)
        case "registers":
            assert states is not None, "registers are known by their hidden states"
            return registers(states).cpu()
        case "random":
            chosen = torch.zeros_like(patches)
            chosen[patches] = random_tokens(there, token_set.number, seed)
            return chosen
        case "gradients":
            assert attributions is not None, "the tokens of highest attribution are known by their attributions"
            return top_tokens(attributions, token_set.number)


def positions(
    side: TokenSet | str, inputs: dict[str, Tensor], image_token_id: int, chosen: Sequence[Tensor] = ()
) -> str | Tensor:
    """What an intervention takes as positions for one side of a knockout, or for a set of visual tokens.

    Args:
        side: A set of visual tokens; `text`: the prompt without visual tokens and without its last position; `last`:
            its last position; `answer`: that one and all that follow, as they are generated.
        inputs: Encoded batch of B samples with any padding.
        image_token_id: Id of the token that stands for one visual token.
        chosen: Of a set of visual tokens, those of each sample: B boolean [P].

    Returns:
        A selector, or a boolean mask over each sample's sequence without padding [B, L].

    Raises:
        ValueError: A sample has another number of visual tokens than its set knows of.
    """
    if isinstance(side, str) and (selector := _OTHERS[side]) is not None:
        return selector
    ids, kept = inputs["input_ids"], inputs["attention_mask"].bool()
    if "labels" in inputs:
        kept = kept & (inputs["labels"] == IGNORED)
    masks = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (sequence, here) in enumerate(zip(ids, kept, strict=True)):
        is_image = (sequence[here] == image_token_id).cpu()
        length = len(is_image)
        if isinstance(side, str):
            masks[row, : length - 1] = ~is_image[:-1]
            continue
        if len(chosen[row]) != int(is_image.sum()):
            raise ValueError(
                f"set {side.name!r}: {len(chosen[row])} tokens for the {int(is_image.sum())} visual tokens of sample "
                f"{row}; place them by the picture that the model is given"
            )
        masks[row, :length][is_image] = chosen[row].cpu()
    return masks
