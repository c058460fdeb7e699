"""Grounds concepts with a running model's unembedding and a feature store's pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..concepts import ground_images, ground_words
from ..lightning_modules import VisionLanguageModel


def words_of(backbone: VisionLanguageModel, U: Tensor, site: str, words: int, candidates: int) -> list[list[str]]:
    """Words of concepts U [K, D] of a site; none for a site whose states are not as wide as the language model's.

    States before the final norm are normed first, as the model itself does.
    """
    weight = backbone.unembed.weight
    assert isinstance(weight, Tensor)
    if U.shape[1] != weight.shape[1]:
        return [[] for _ in U]
    with torch.inference_mode():
        norm = None if site == "lm.norm" else backbone.final_norm
        return ground_words(U, weight.detach(), backbone.vocabulary, norm=norm, candidates=candidates, words=words)


def pictures_of(
    V: Tensor, ids: list[str], samples: dict[str, dict[str, Any]], images: int
) -> list[list[dict[str, Any]]]:
    """The samples that activate each concept most.

    Args:
        V: Activations [N, K].
        ids: Sample id of each row [N].
        samples: Sample id → row of the feature store.
        images: Samples per concept.

    Returns:
        For each concept, sample id, picture, what the model said, and the activation, strongest first.
    """
    return [
        [
            {
                "sample_id": ids[row],
                "image": samples[ids[row]]["image"],
                "text": samples[ids[row]]["text"],
                "activation": float(V[row, concept]),
            }
            for row in rows
        ]
        for concept, rows in enumerate(ground_images(V, min(images, len(ids))).tolist())
    ]
