"""LightningModules: fine-tuning and extraction."""

from .backbone import VisionLanguageModel
from .base import BackboneModule
from .extraction import Extraction, FeatureExtraction
from .finetuning import FineTuning, LoraOptions

__all__ = ["BackboneModule", "Extraction", "FeatureExtraction", "FineTuning", "LoraOptions", "VisionLanguageModel"]
