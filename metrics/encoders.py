"""Loads the encoders that scores are computed with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel


def load_whole(place: str, needless: str | None = None) -> Any:
    """Load a model in float32 of which every tensor is in its files: transformers makes up what lacks.

    Args:
        place: Folder or hub id.
        needless: What the names of tensors begin with that may lack, because nothing is computed with them.

    Raises:
        ValueError: A tensor lacks; names it.
    """
    loaded: Any = AutoModel.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    model, told = loaded
    missing = sorted(name for name in told["missing_keys"] if needless is None or not name.startswith(needless))
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(f"its files have no {missing[0]}{others}, which would be random; give whole files")
    return model
