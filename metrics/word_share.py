"""How many captions speak of a class of words: the color share, the place share."""

import re
from collections.abc import Collection, Mapping, Sequence

from .bootstrap import Measure, mean_measure


def word_share(captions: Sequence[str], words: Collection[str]) -> float:
    """Return the share of captions that contain at least one of the words.

    A word matches as a whole and in any case: "red" is in "A RED-hot stove", not in "tired" or "redder".

    Args:
        captions: The captions.
        words: The word class; a word may consist of several ("light blue").

    Returns:
        Share in 0..1.

    Raises:
        ValueError: If there are no captions or no words.
    """
    found = _found(captions, words)
    return sum(found) / len(found)


def word_share_measure(captions: Mapping[str, str], words: Collection[str]) -> Measure:
    """Return the `word_share` as a measure, for intervals.

    Args:
        captions: id → caption.
        words: The word class.

    Raises:
        ValueError: As `word_share`.
    """
    return mean_measure(_found([captions[i] for i in sorted(captions)], words))


def _found(captions: Sequence[str], words: Collection[str]) -> list[bool]:
    if not captions or not words:
        raise ValueError(
            f"`captions` and `words` must not be empty, got {len(captions)} and {len(words)}: "
            "a share needs something to count and something to look for"
        )
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
    return [pattern.search(caption) is not None for caption in captions]
