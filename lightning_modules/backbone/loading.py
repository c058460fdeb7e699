"""Loads models and processors from a folder or the hub, and tells them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor


def load_pretrained(
    model_id: str, *, revision: str | None, dtype: str, attention: str, random_weights: bool
) -> tuple[Any, Any]:
    """Load a model and its processor; see `VisionLanguageModel.load`.

    Raises:
        ValueError: Nothing can be loaded from `model_id`.
    """
    try:
        processor = AutoProcessor.from_pretrained(model_id, revision=revision)
        if random_weights:
            config = AutoConfig.from_pretrained(model_id, revision=revision)
            model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
            _initialise_by_fan_in(model)
        else:
            model = AutoModelForImageTextToText.from_pretrained(
                model_id, revision=revision, dtype=dtype, attn_implementation=attention
            )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model_id {model_id!r}: no image-text-to-text model can be loaded from it ({first}); give a folder "
            "in the Hugging Face layout or a hub id"
        ) from error
    return model, processor


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over named tensors, independent of their order and device."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def image_token_id(config: Any) -> int:
    """Id of the token that stands for one visual token.

    Raises:
        ValueError: The configuration names none.
    """
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise ValueError(f"{type(config).__name__} names no image token; this model is no image-text-to-text model")


def _initialise_by_fan_in(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # As large as what the other layers put beside them: positions that whisper are not heard for long.
            nn.init.normal_(module.weight)
