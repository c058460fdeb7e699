"""The states that concepts are learned from and that their shift is measured on."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ..datamodules.stored_features import FeatureStore
from ..lightning_modules.backbone import Selector
from ..lightning_modules.extraction import Variant
from ..metrics import word_share


@dataclass(frozen=True)
class ConceptStates:
    """States of one site, selector and variant.

    Attributes:
        ids: Sample id of each state [N].
        states: The states [N, D], float32.
        tokens: The token that each state predicts [N].
        samples: Sample id → row of the store, of every sample of the variant.
        matched: How many samples the selector matched.
        confirmed: How many of these are here: see `read`.
    """

    ids: list[str]
    states: Tensor
    tokens: list[str]
    samples: dict[str, dict[str, Any]]
    matched: int
    confirmed: int

    @classmethod
    def read(cls, store: FeatureStore, site: str, selector: str, variant: Variant) -> ConceptStates:
        """Read them from a store.

        Of a token of interest, samples with reference captions count only if one of these has the word too (CoX-LMM,
        arXiv 2406.08074, section 3): a concept is to be of what is in the picture.

        Raises:
            ValueError: There are none.
        """
        ids, states = store.states(site, selector, variant)
        samples = store.samples(variant)
        matched = set(ids)
        confirmed = {sample_id for sample_id in matched if _is_confirmed(samples[sample_id]["references"], selector)}
        left_out = f"; {len(matched - confirmed)} have the word in no reference" if confirmed < matched else ""
        rank_zero_info(
            f"{store.folder}: {selector} matched {len(matched)} of {len(samples)} {variant} samples{left_out}"
        )
        if not confirmed:
            raise ValueError(
                f"{store.folder}: selector {selector!r} matched {len(matched)} {variant} samples, but none of them has "
                "the word in a reference caption; choose a word that is in the pictures"
            )
        found = cls(ids, states, store.tokens(selector, variant), samples, len(matched), len(confirmed))
        return found if confirmed == matched else found.of(confirmed)

    def of(self, sample_ids: Container[str]) -> ConceptStates:
        """The states of some samples."""
        rows = [row for row, sample_id in enumerate(self.ids) if sample_id in sample_ids]
        return replace(
            self,
            ids=[self.ids[row] for row in rows],
            states=self.states[torch.tensor(rows, dtype=torch.long)],
            tokens=[self.tokens[row] for row in rows],
        )


def _is_confirmed(references: list[str], selector: str) -> bool:
    if not references or not selector.startswith("token_of_interest:"):
        return True
    return word_share(references, Selector.parse(selector).words) > 0
