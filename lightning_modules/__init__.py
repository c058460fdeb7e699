"""LightningModules: fine-tuning and extraction."""

from .finetuning import FineTuning, LoraOptions

__all__ = ["FineTuning", "LoraOptions"]
