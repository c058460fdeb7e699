"""The one wrapper over any transformers vision-language model."""

from .generation import Generation, Rows
from .interventions import Condition, Steering
from .model import VisionLanguageModel
from .prompts import PromptEncoder
from .selectors import Selector
from .sites import Site
from .token_map import Role, TokenMap

__all__ = [
    "Condition",
    "Generation",
    "PromptEncoder",
    "Role",
    "Rows",
    "Selector",
    "Site",
    "Steering",
    "TokenMap",
    "VisionLanguageModel",
]
