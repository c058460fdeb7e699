"""Lightning glue: write features, fit dictionaries, measure shift, steer, score."""

from .feature_writer import FeatureWriter
from .model_export import ModelExport

__all__ = ["FeatureWriter", "ModelExport"]
