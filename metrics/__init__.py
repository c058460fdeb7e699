"""Scores of captions, answers and groundings, as torchmetrics classes and as functions."""

from .bert import BertScorer
from .caption import CaptionScores, caption_scores, caption_scores_per_sample
from .clip import ClipEncoder, clip_score
from .comparison import compare
from .concept_scores import GroundedConcepts, score_columns
from .grounding import concept_overlap
from .ptb import java_tokenize, ptb_tokenize
from .published import published_scores
from .rows import RowMetric
from .statistics import bootstrap_interval, paired_bootstrap_interval, paired_t_test
from .vqa import VQAAccuracy, answer_counts, normalize_answer, vqa_accuracy, vqa_scores
from .word_share import word_share

__all__ = [
    "BertScorer",
    "CaptionScores",
    "ClipEncoder",
    "GroundedConcepts",
    "RowMetric",
    "VQAAccuracy",
    "answer_counts",
    "bootstrap_interval",
    "caption_scores",
    "caption_scores_per_sample",
    "clip_score",
    "compare",
    "concept_overlap",
    "java_tokenize",
    "normalize_answer",
    "paired_bootstrap_interval",
    "paired_t_test",
    "ptb_tokenize",
    "published_scores",
    "score_columns",
    "vqa_accuracy",
    "vqa_scores",
    "word_share",
]
