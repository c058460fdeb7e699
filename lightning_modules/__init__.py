"""LightningModules: fine-tuning, extraction, and replay of what was extracted."""

from .backbone import VisionLanguageModel
from .base import BackboneModule
from .extraction import Extraction, FeatureExtraction
from .finetuning import FineTuning, LoraOptions
from .replay import Replay
from .steering import SteeringStep
from .sweep import SteeringSweep

__all__ = [
    "BackboneModule",
    "Extraction",
    "FeatureExtraction",
    "FineTuning",
    "LoraOptions",
    "Replay",
    "SteeringStep",
    "SteeringSweep",
    "VisionLanguageModel",
]
