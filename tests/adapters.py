"""Adapters of any PEFT method for a model, and what PEFT and transformers alone make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor
from transformers import AutoModelForImageTextToText

TEXT = {"target_modules": r".*language_model.*\.(q_proj|v_proj)"}
"""Layers of the language model, as PEFT names them by a pattern."""


def options_of(kind: str, options: dict[str, Any] | None) -> dict[str, Any]:
    if options is not None:
        return options
    has_rank = "r" in PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)].__dataclass_fields__
    return {**TEXT, "r": 4} if has_rank else TEXT


def plain(tiny: Path) -> Any:
    """The model as transformers alone loads it."""
    return AutoModelForImageTextToText.from_pretrained(tiny, attn_implementation="sdpa").eval()


def write_adapter(tiny: Path, folder: Path, kind: str, options: dict[str, Any] | None, seed: int = 3) -> Path:
    """An adapter of any kind whose weights are those of a training: not zero, and unlike the original's."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**options_of(kind, options))
    generator = torch.Generator().manual_seed(seed)
    model = PeftModel(plain(tiny), config)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad and value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape, generator=generator).to(value))
    model.save_pretrained(str(folder))
    return folder


@torch.no_grad()
def by_peft(tiny: Path, folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    """Logits as PEFT alone has them; some methods draw what they begin from."""
    torch.manual_seed(0)
    logits: Tensor = PeftModel.from_pretrained(plain(tiny), folder).eval()(**inputs).logits
    return logits
