"""Scores of captions, answers and groundings, as torchmetrics classes and as functions."""

from .answer_types import learn_answer_types, predicted_types
from .bert import BertScorer
from .bootstrap import Measure, Scored, bootstrap, difference, mean_measure
from .caption import CaptionScores, caption_measures, caption_scores
from .caption_scorers import ScoreName, check_scores
from .chair import chair_measures, chair_scores
from .clip import ClipEncoder, clip_score
from .comparison import compare
from .concept_scores import GroundedConcepts, score_columns
from .grounding import concept_overlap
from .lens import Segmentation, decoded, ranking_measures, segmentation
from .ptb import java_tokenize, ptb_tokenize
from .published import published_ablation, published_knockout, published_lens, published_scores
from .rows import RowMetric
from .statistics import bootstrap_interval, paired_bootstrap_interval, paired_t_test
from .text import text_measures
from .vqa import (
    ANSWER_TYPES,
    N_ANSWERS,
    VQAAccuracy,
    answer_counts,
    normalize_answer,
    vqa_accuracy,
    vqa_measures,
    vqa_scores,
)
from .word_share import word_share, word_share_measure

__all__ = [
    "ANSWER_TYPES",
    "N_ANSWERS",
    "BertScorer",
    "CaptionScores",
    "ClipEncoder",
    "GroundedConcepts",
    "Measure",
    "RowMetric",
    "ScoreName",
    "Scored",
    "Segmentation",
    "VQAAccuracy",
    "answer_counts",
    "bootstrap",
    "bootstrap_interval",
    "caption_measures",
    "caption_scores",
    "chair_measures",
    "chair_scores",
    "check_scores",
    "clip_score",
    "compare",
    "concept_overlap",
    "decoded",
    "difference",
    "java_tokenize",
    "learn_answer_types",
    "mean_measure",
    "normalize_answer",
    "paired_bootstrap_interval",
    "paired_t_test",
    "predicted_types",
    "ptb_tokenize",
    "published_ablation",
    "published_knockout",
    "published_lens",
    "published_scores",
    "ranking_measures",
    "score_columns",
    "segmentation",
    "text_measures",
    "vqa_accuracy",
    "vqa_measures",
    "vqa_scores",
    "word_share",
    "word_share_measure",
]
