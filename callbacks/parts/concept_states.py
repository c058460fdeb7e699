"""The states that concepts are learned from and that their shift is measured on."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ...datamodules.stored_features import FeatureStore, StateShards
from ...lightning_modules.backbone import Selector
from ...metrics import word_share


@dataclass(frozen=True)
class ConceptStates:
    """States of one site, selector and variant.

    Attributes:
        store: Where they are.
        ids: Sample id of each state [N].
        shards: The states [N, D], to be read piece by piece.
        positions: Position of each state in its sample's sequence [N].
        tokens: The token that each state predicts [N].
        samples: Sample id → row of the store, of every sample of the variant.
        matched: How many samples the selector matched.
        confirmed: How many of these are here: see `read`.
    """

    store: FeatureStore
    ids: list[str]
    shards: StateShards
    positions: list[int]
    tokens: list[str]
    samples: dict[str, dict[str, Any]]
    matched: int
    confirmed: int

    @classmethod
    def read(cls, store: FeatureStore, site: str, selector: str, variant: str, quiet: bool = False) -> ConceptStates:
        """Read them from a store.

        Of a token of interest, samples with reference captions count only if one of these has the word too (CoX-LMM,
        arXiv 2406.08074, section 3): a concept is to be of what is in the picture.

        Raises:
            ValueError: There are none.
        """
        ids, shards = store.shards(site, selector, variant)
        samples = store.samples(variant)
        matched = set(ids)
        confirmed = {sample_id for sample_id in matched if _is_confirmed(samples[sample_id]["references"], selector)}
        left_out = f"; {len(matched - confirmed)} have the word in no reference" if confirmed < matched else ""
        if not quiet:
            rank_zero_info(
                f"{store.folder}: {selector} matched {len(matched)} of {len(samples)} {variant} samples{left_out}"
            )
        if not confirmed:
            raise ValueError(
                f"{store.folder}: selector {selector!r} matched {len(matched)} {variant} samples, but none of them has "
                "the word in a reference caption; choose a word that is in the pictures"
            )
        positions, tokens = store.positions(selector, variant), store.tokens(selector, variant)
        found = cls(store, ids, shards, positions, tokens, samples, len(matched), len(confirmed))
        return found if confirmed == matched else found.of(confirmed)

    @cached_property
    def states(self) -> Tensor:
        """All states in memory [N, D], float32."""
        return self.shards.load()

    def of(self, sample_ids: Container[str]) -> ConceptStates:
        """The states of some samples."""
        rows = [row for row, sample_id in enumerate(self.ids) if sample_id in sample_ids]
        return replace(
            self,
            ids=[self.ids[row] for row in rows],
            shards=self.shards.take(rows),
            positions=[self.positions[row] for row in rows],
            tokens=[self.tokens[row] for row in rows],
        )


def _is_confirmed(references: list[str], selector: str) -> bool:
    if not references or not selector.startswith("token_of_interest:"):
        return True
    return word_share(references, Selector.parse(selector).words) > 0
