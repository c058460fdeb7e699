"""Measures what a model can no longer answer when some positions may not attend to others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ..datamodules.object_names import ObjectNames
from ..lightning_modules import Inspection
from ..lightning_modules.backbone.knockout import AttentionKnockout, self_attention
from ..lightning_modules.backbone.knockout_names import KnockoutName, TokenSet
from ..metrics import published_knockout
from .parts.knockout_scores import summarize_knockout
from .parts.numbers import log_rows
from .parts.object_meter import ObjectMeter
from .parts.trial_figures import knockout_figure, knockout_table, show_figures
from .parts.trials import Asked, Found

_SIDES = (
    "object -> last",
    "object+1 -> last",
    "object+2 -> last",
    "image-object+1 -> last",
    "object+1 -> answer",
    "image -> last_row",
)
_WINDOWS = ("early", "early-mid", "mid", "mid-late", "late", "all")


class KnockoutMeter(ObjectMeter):
    """Knocks attention out in a window of blocks, and counts the right answers that stay right.

    Towards Interpreting Visual Information Processing in Vision-Language Models (arXiv 2410.07149), §5. What the object
    is, the answer has to learn from somewhere: the window in which it no longer can tells where in the model that
    happens.

    Writes `knockout.json`, `samples.parquet` and `figures/`. Intervals are bootstraps over pictures, at 95 %.

    Args:
        out: Folder to write to; by default `knockout` in the run's folder.
        knockouts: `sources -> targets @ window`, such as `object+1 -> last @ mid-late`. Sources and targets are sets of
            visual tokens as in AblationMeter, but no `gradients`; `text`, the prompt without its last position; `last`,
            that position; and, as targets, `answer`, it and all that are generated. Windows are `early`, `early-mid`,
            `mid`, `mid-late`, `late` and `all`, scaled to the model's depth, or numbers of blocks such as `3-7`. By
            default what is published: the object, it with up to 2 rings, and the picture without these to the last
            position, and the picture to its last row, in every window that can matter; and the object to the whole
            answer, for descriptions, which name it later than at that position.
        overwrite: Begin anew, whatever is there.
    """

    result = "knockout.json"

    place = "knockout"

    def __init__(self, out: str | None = None, knockouts: list[str] | None = None, overwrite: bool = False) -> None:
        super().__init__(out, overwrite)
        self.by_default = knockouts is None
        names = [f"{sides} @ {window}" for sides in _SIDES for window in _WINDOWS] if knockouts is None else knockouts
        self.names = names
        if not names:
            raise ValueError("KnockoutMeter.knockouts: expected at least one, such as 'object+1 -> last @ mid-late'")
        self.knockouts = {name: KnockoutName.parse(name) for name in names}
        for name, knockout in self.knockouts.items():
            for side in (knockout.sources, knockout.targets):
                if isinstance(side, TokenSet) and side.kind == "gradients":
                    raise ValueError(
                        f"knockout {name!r}: {side.name!r} wants a reference token, which AblationMeter has; name "
                        "another set"
                    )

    def options(self) -> dict[str, Any]:
        """What its measurements depend on, besides model and data."""
        return {"knockouts": self.names}

    def check(self, module: Inspection) -> None:
        """Check that the model has the blocks, that they have attention that can be knocked out, and somebody to tell.

        Raises:
            ValueError: They have not, or a knockout can change no logit of an answer.
        """
        backbone = module.backbone
        count = len(backbone.structure.blocks)
        # What the last block tells positions before the answer, nothing reads any more.
        mute = [
            name
            for name, knockout in self.knockouts.items()
            if list(knockout.blocks(count)) == [count - 1] and knockout.targets not in ("last", "answer")
        ]
        if mute and not self.by_default:
            raise ValueError(
                f"knockout {mute[0]!r} changes no logit of an answer: its targets are read by no block after the last; "
                "name an earlier block too"
            )
        self.knockouts = {name: one for name, one in self.knockouts.items() if name not in mute}
        blocks = sorted({number for knockout in self.knockouts.values() for number in knockout.blocks(count)})
        for site in backbone.sites([f"lm.block.{number}" for number in blocks]):
            self_attention(site)

    def measure(self, asked: Asked, names: ObjectNames) -> Iterator[tuple[str, Sequence[int], Sequence[str]]]:
        """Knock out one after the other."""
        count = len(asked.backbone.structure.blocks)
        for name, knockout in self.knockouts.items():
            (sources, counts), (targets, others) = (_side(asked, side) for side in (knockout.sources, knockout.targets))
            tokens = [mine if theirs else 0 for mine, theirs in zip(counts, others, strict=True)]
            if any(tokens):
                yield name, tokens, asked.answer(name, [AttentionKnockout(sources, targets, knockout.blocks(count))])

    def summarize(self, module: Inspection, found: Found, names: ObjectNames) -> dict[str, Any]:
        """Shares of answers that stay right, with intervals, and what is published."""
        depth = len(module.backbone.structure.blocks)
        variants = {name: summarize_knockout(found, name, self.knockouts, depth) for name in module.variants}
        return {"variants": variants, "nowhere": found.nowhere(self.knockouts), "published": published_knockout()}

    def show(self, trainer: L.Trainer, summary: dict[str, Any]) -> None:
        """Draw lines over windows, and print the table."""
        show_figures({"knockout": knockout_figure(summary)}, self.out, trainer)
        log_rows(trainer, "knockout", summary, "knockout", "relative_accuracy")
        rank_zero_info(f"{self.out / self.result}\n{knockout_table(summary)}")


def _side(asked: Asked, side: TokenSet | str) -> tuple[str | Tensor, list[int]]:
    """Positions of one side of a knockout, and how many each sample has."""
    if isinstance(side, TokenSet):
        chosen = asked.choose(side)
        return asked.positions(side, chosen), [int(tokens.sum()) for tokens in chosen]
    positions = asked.positions(side)
    counts = positions.sum(dim=1).tolist() if isinstance(positions, Tensor) else [1] * len(asked.samples)
    return positions, counts
