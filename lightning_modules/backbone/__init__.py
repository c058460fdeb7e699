"""The one wrapper over any transformers vision-language model."""

from .model import VisionLanguageModel
from .prompts import PromptEncoder

__all__ = ["PromptEncoder", "VisionLanguageModel"]
