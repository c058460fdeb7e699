"""LightningModules: fine-tuning, extraction, inspection, and replay of what was extracted."""

from .backbone import VisionLanguageModel
from .base import BackboneModule
from .extraction import Extraction, FeatureExtraction
from .finetuning import FineTuning, LoraOptions
from .inspection import Answers, Inspection
from .replay import Replay
from .steering import SteeringStep
from .sweep import SteeringSweep

__all__ = [
    "Answers",
    "BackboneModule",
    "Extraction",
    "FeatureExtraction",
    "FineTuning",
    "Inspection",
    "LoraOptions",
    "Replay",
    "SteeringStep",
    "SteeringSweep",
    "VisionLanguageModel",
]
