"""What a feature store holds of an extracted batch."""

from __future__ import annotations

import torch

from ...datamodules.base import input_hashes
from ...datamodules.sample import Batch
from ...datamodules.stored_features import Row
from ...lightning_modules.extraction import Extraction


def store_rows(outputs: list[Extraction], batch: Batch) -> tuple[list[Row], list[Row], dict[str, torch.Tensor]]:
    """Rows of the samples, rows of their states, and site → states in the same order.

    Args:
        outputs: What each variant gave, at least one.
        batch: The samples.
    """
    return _sample_rows(outputs, batch), _state_rows(outputs, batch), _tensors(outputs)


def _sample_rows(outputs: list[Extraction], batch: Batch) -> list[Row]:
    inputs = input_hashes(batch.samples)
    return [
        {
            "sample_id": sample.sample_id,
            "variant": extraction.variant,
            "image": str(sample.image),
            "prompt": sample.prompt,
            "text": text,
            "references": list(sample.references),
            "answers": list(sample.answers),
            "label": sample.label,
            "input": shown,
        }
        for extraction in outputs
        for sample, text, shown in zip(batch.samples, extraction.texts, inputs, strict=True)
    ]


def _state_rows(outputs: list[Extraction], batch: Batch) -> list[Row]:
    return [
        {
            "sample_id": batch.samples[sample].sample_id,
            "variant": extraction.variant,
            "selector": rows.selector,
            "position": position,
            "token": token,
        }
        for extraction in outputs
        for rows in extraction.rows
        for sample, position, token in zip(rows.samples, rows.positions, rows.tokens, strict=True)
    ]


def _tensors(outputs: list[Extraction]) -> dict[str, torch.Tensor]:
    """Site → states in the order of `_state_rows`."""
    sites = outputs[0].rows[0].states
    return {
        site: torch.cat([rows.states[site] for extraction in outputs for rows in extraction.rows]) for site in sites
    }
