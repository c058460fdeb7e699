"""Lightning glue: write features, fit dictionaries, measure shift, steer, score."""

from .model_export import ModelExport

__all__ = ["ModelExport"]
