"""Lightning glue: write features, fit dictionaries, measure shift, steer, score."""

from .ablation_meter import AblationMeter
from .caption_scorer import CaptionScorer
from .causal_checker import CausalChecker
from .dictionary_fitter import DictionaryFitter
from .feature_writer import FeatureWriter
from .fine_vector_maker import FineVectorMaker
from .grounding_scorer import GroundingScorer
from .knockout_meter import KnockoutMeter
from .lens_scorer import LensScorer
from .logit_lens import LogitLens
from .model_export import ModelExport
from .parts.grounding import GroundingOptions
from .parts.shift_measure import ShiftOptions
from .parts.state_sets import OfConcept, StateSet
from .shift_meter import ShiftMeter
from .shift_monitor import ShiftMonitor
from .steerer import Steerer
from .steering_vector_maker import SteeringVectorMaker
from .sweep_scorer import SweepScorer, SweepTarget
from .training_audit import TrainingAudit
from .vqa_scorer import VQAScorer

__all__ = [
    "AblationMeter",
    "CaptionScorer",
    "CausalChecker",
    "DictionaryFitter",
    "FeatureWriter",
    "FineVectorMaker",
    "GroundingOptions",
    "GroundingScorer",
    "KnockoutMeter",
    "LensScorer",
    "LogitLens",
    "ModelExport",
    "OfConcept",
    "ShiftMeter",
    "ShiftMonitor",
    "ShiftOptions",
    "StateSet",
    "Steerer",
    "SteeringVectorMaker",
    "SweepScorer",
    "SweepTarget",
    "TrainingAudit",
    "VQAScorer",
]
