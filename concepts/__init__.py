"""Pure tensor mathematics of concepts: dictionaries, grounding, matching, shift, recovery, significance, steering."""

from ._averages import Average
from .artifacts import content_hash, load_artifact, save_artifact
from .correlation import Correlation, correlation
from .dictionary import ConceptDictionary, load_dictionary, strongest
from .direction_selection import DirectionSelection, select_direction
from .draws import shift_draws
from .grounding import english_lexicon, english_stop_words, ground_images, ground_words
from .kmeans import KMeans
from .matching import match_concepts, stability
from .mean_token import MeanToken, TokenMoments, object_direction
from .overcomplete import Overcomplete
from .pca import PCA
from .recovery import Groundings, Recovery, recovery, t_overlap
from .report import FitReport
from .semi_nmf import SemiNMF
from .shift import ConceptShift, concept_shift, load_shift, pair_rows
from .significance import ShiftSignificance, shift_significance
from .simple import Simple
from .steering import (
    cluster_vectors,
    coarse_vector,
    fine_vector,
    principal_vector,
    probe_accuracy,
    probe_vector,
    random_vector_like,
    shuffled_vectors,
    vector_length,
    with_length,
)
from .steering_vectors import SteeringVectors, load_steering_vectors

__all__ = [
    "PCA",
    "Average",
    "ConceptDictionary",
    "ConceptShift",
    "Correlation",
    "DirectionSelection",
    "FitReport",
    "Groundings",
    "KMeans",
    "MeanToken",
    "Overcomplete",
    "Recovery",
    "SemiNMF",
    "ShiftSignificance",
    "Simple",
    "SteeringVectors",
    "TokenMoments",
    "cluster_vectors",
    "coarse_vector",
    "concept_shift",
    "content_hash",
    "correlation",
    "english_lexicon",
    "english_stop_words",
    "fine_vector",
    "ground_images",
    "ground_words",
    "load_artifact",
    "load_dictionary",
    "load_shift",
    "load_steering_vectors",
    "match_concepts",
    "object_direction",
    "pair_rows",
    "principal_vector",
    "probe_accuracy",
    "probe_vector",
    "random_vector_like",
    "recovery",
    "save_artifact",
    "select_direction",
    "shift_draws",
    "shift_significance",
    "shuffled_vectors",
    "stability",
    "strongest",
    "t_overlap",
    "vector_length",
    "with_length",
]
