"""Measures of texts that need nothing to compare with: how long they are, and how much they repeat themselves."""

from collections.abc import Mapping
from itertools import pairwise

from .bootstrap import Measure, mean_measure


def text_measures(texts: Mapping[str, str]) -> dict[str, Measure]:
    """Return measures of what steering breaks first.

    Args:
        texts: id → text.

    Returns:
        "length": mean number of words, split at spaces. "repetition": mean share of bigrams of words that the text has
        had before, 1 - distinct / all, seq-rep-2 of "Neural Text Generation with Unlikelihood Training" (arXiv
        1908.04319); 0 for a text of fewer than two words.
    """
    words = [texts[i].split() for i in sorted(texts)]
    return {
        "length": mean_measure([len(text) for text in words]),
        "repetition": mean_measure([_repetition(text) for text in words]),
    }


def _repetition(words: list[str]) -> float:
    bigrams = list(pairwise(words))
    return 1 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0
