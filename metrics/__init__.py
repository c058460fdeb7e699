"""Scores of captions, answers and groundings, as torchmetrics classes and as functions."""

from .caption import CaptionScores, caption_scores, caption_scores_per_sample
from .grounding import concept_overlap
from .ptb import java_tokenize, ptb_tokenize
from .rows import RowMetric
from .vqa import VQAAccuracy, answer_counts, normalize_answer, vqa_accuracy, vqa_scores
from .word_share import word_share

__all__ = [
    "CaptionScores",
    "RowMetric",
    "VQAAccuracy",
    "answer_counts",
    "caption_scores",
    "caption_scores_per_sample",
    "concept_overlap",
    "java_tokenize",
    "normalize_answer",
    "ptb_tokenize",
    "vqa_accuracy",
    "vqa_scores",
    "word_share",
]
