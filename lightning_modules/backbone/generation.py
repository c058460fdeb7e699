"""What a pass through the model returns: answers, and states with their token map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .logit_lens import LensReading
from .selectors import Selector
from .token_map import TokenMap


@dataclass
class Rows:
    """States that one selector picked from a batch.

    Attributes:
        selector: The selector's text.
        samples: Row of the batch that each state belongs to [N].
        positions: Position in the sample's sequence without padding [N]; the last one of a mean.
        tokens: The token that each state predicts [N], decoded; of a mean, nothing.
        states: Site → states [N, D].
    """

    selector: str
    samples: list[int]
    positions: list[int]
    tokens: list[str]
    states: dict[str, Tensor]


@dataclass(frozen=True)
class Prefilled:
    """Prompts of which the model has computed all but the last position.

    Attributes:
        prompts: `input_ids`, `attention_mask` and the like [B, T], padded on the left; without pictures, which are in
            the cache.
        cache: Keys and values of the first T − 1 columns.
        rope_deltas: Of models that keep where the positions of their prompts end.
    """

    prompts: dict[str, Tensor]
    cache: Any
    rope_deltas: Tensor | None = None


@dataclass
class Generation:
    """Answers to B prompts.

    Attributes:
        texts: Decoded answers without special tokens.
        token_map: What stands where.
        states: Site → states [B, columns, D] in the token map's columns; the last answer token has none.
        lens: What the layers decode, where that was asked for.
    """

    texts: list[str]
    token_map: TokenMap
    states: dict[str, Tensor]
    lens: LensReading | None = None

    def select(self, selector: Selector, vocabulary: list[str]) -> Rows:
        """Pick states by position.

        Args:
            selector: Which.
            vocabulary: Decoded tokens by id.
        """
        columns_with_state = next(iter(self.states.values())).shape[1]
        samples: list[int] = []
        columns: list[list[int]] = []
        for sample in range(len(self.texts)):
            chosen = selector.columns(self.token_map, sample, columns_with_state)
            groups = [chosen] if selector.is_mean and chosen else [[column] for column in chosen]
            samples += [sample] * len(groups)
            columns += groups
        first = self.token_map.first_column.tolist()
        ids = self.token_map.token_ids
        return Rows(
            selector=selector.name,
            samples=samples,
            positions=[group[-1] - first[sample] for sample, group in zip(samples, columns, strict=True)],
            tokens=[
                "" if selector.is_mean else _text_of(int(ids[sample, group[0] + 1]), vocabulary)
                for sample, group in zip(samples, columns, strict=True)
            ],
            states={site: _gather(state, samples, columns) for site, state in self.states.items()},
        )


def _text_of(token: int, vocabulary: list[str]) -> str:
    """A token as text; nothing for one that can stand in a prompt only."""
    return vocabulary[token] if token < len(vocabulary) else ""


def _gather(state: Tensor, samples: list[int], columns: list[list[int]]) -> Tensor:
    """Mean state of each group of columns [N, D]; single columns are taken as they are."""
    if not samples:
        return state.new_zeros(0, state.shape[-1])
    if all(len(group) == 1 for group in columns):
        return state[samples, [group[0] for group in columns]]
    means = [
        state[sample, group].float().mean(dim=0).to(state.dtype) for sample, group in zip(samples, columns, strict=True)
    ]
    return torch.stack(means)
