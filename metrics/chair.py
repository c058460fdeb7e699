"""CHAIR: how many of the objects that captions name are not in their pictures.

Source: "Object Hallucination in Image Captioning" (Rohrbach et al. 2018, arXiv 1809.02156), equations 1 and 2.
"""

from collections.abc import Collection, Mapping

import numpy as np

from .bootstrap import Measure, ratio


def chair_measures(named: Mapping[str, Collection[str]], there: Mapping[str, Collection[str]]) -> dict[str, Measure]:
    """Return CHAIR_i and CHAIR_s as measures, for intervals.

    Args:
        named: id → classes that the caption names; a class counts once in a caption, however often it is named.
        there: id → classes that are in the picture; in the paper those of its instances, and those that one of the
            reference captions names.

    Returns:
        "chair_i": named classes that are not there, of all that are named. "chair_s": captions with one of these, of
        all captions.

    Raises:
        ValueError: There is no caption, or not the same ids.
    """
    if not named or named.keys() != there.keys():
        raise ValueError(
            f"CHAIR needs captions and what is in their pictures, of the same ids, got {len(named)} and {len(there)}"
        )
    ids = sorted(named)
    counts = np.array([[len(set(named[i]) - set(there[i])), len(set(named[i]))] for i in ids], dtype=np.float64)
    sentences = np.stack([counts[:, 0] > 0, np.ones(len(ids))], axis=1).astype(np.float64)
    return {"chair_i": Measure(counts, ratio), "chair_s": Measure(sentences, ratio)}


def chair_scores(named: Mapping[str, Collection[str]], there: Mapping[str, Collection[str]]) -> dict[str, float]:
    """Return CHAIR_i and CHAIR_s of a set of captions; see `chair_measures`.

    Returns:
        "chair_i" (not a number where no caption names anything) and "chair_s", in 0..1.

    Raises:
        ValueError: As `chair_measures`.
    """
    return {name: measure.value for name, measure in chair_measures(named, there).items()}
