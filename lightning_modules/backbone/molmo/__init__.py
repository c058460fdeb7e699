"""Molmo-7B-D: its configuration, model and processors, known to transformers' Auto classes once this is imported.

The published repository brings Python code of its own, written for an older transformers. It is never run: what is
here reads the same configuration, weights and tokenizer.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from .configuration import MolmoConfig
from .image_processing import MolmoImageProcessor
from .modeling import MolmoForConditionalGeneration
from .processing import MolmoProcessor
from .weights import published_weights

__all__ = ["MolmoConfig", "MolmoForConditionalGeneration", "MolmoImageProcessor", "MolmoProcessor"]

AutoConfig.register(MolmoConfig.model_type, MolmoConfig, exist_ok=True)
AutoModelForImageTextToText.register(MolmoConfig, MolmoForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(MolmoConfig, slow_image_processor_class=MolmoImageProcessor, exist_ok=True)
AutoProcessor.register(MolmoConfig, MolmoProcessor, exist_ok=True)
register_checkpoint_conversion_mapping(MolmoConfig.model_type, published_weights(), overwrite=True)
