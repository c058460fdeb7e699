"""Readers of captions, questions, data sets of the hub and stored features, and the embedded Shapes data set."""

from .base import PictureDataModule
from .captioning import CAPTION_PROMPT, CaptionDataModule
from .folder import FolderDataModule
from .hub import HubDataModule
from .images import BadImageError, read_image
from .mixture import MixtureDataModule
from .object_names import ObjectNames
from .objects import ObjectDataModule
from .pictures import PicturesDataModule
from .replay import StoredFeatures
from .sample import Batch, Sample, SkippedSample
from .visual_genome import VisualGenomeDataModule
from .vqa import VQA_PROMPT, VQADataModule
from .word_classes import WORD_CLASSES, word_class

__all__ = [
    "CAPTION_PROMPT",
    "VQA_PROMPT",
    "WORD_CLASSES",
    "BadImageError",
    "Batch",
    "CaptionDataModule",
    "FolderDataModule",
    "HubDataModule",
    "MixtureDataModule",
    "ObjectDataModule",
    "ObjectNames",
    "PictureDataModule",
    "PicturesDataModule",
    "Sample",
    "SkippedSample",
    "StoredFeatures",
    "VQADataModule",
    "VisualGenomeDataModule",
    "read_image",
    "word_class",
]
