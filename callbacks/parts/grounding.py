"""Grounds concepts in words, with the readout of a model, and in the pictures of a feature store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...concepts import ground_images, ground_words
from ...lightning_modules.backbone.readout import Readout
from ...records.hashes import file_hash
from ...records.paths import user_path


@dataclass(frozen=True)
class GroundingOptions:
    """What concepts are grounded in.

    Attributes:
        words: Words per concept.
        candidates: Tokens with the largest logits, among which words are looked for.
        images: Pictures per concept.
        lexicon: File with one admissible word a line; by default the installed list of English words. Its words of
            several tokens count where the installed list has them too.
        stop_words: File with one word a line that says nothing; by default the installed list.
        norm: Whether the model's final norm is applied to concepts first; by default at every site before it.
    """

    words: int = 10
    candidates: int = 50
    images: int = 5
    lexicon: str | None = None
    stop_words: str | None = None
    norm: bool | None = None

    def check(self) -> None:
        """Check what can be checked before hours of extraction.

        Raises:
            ValueError: A number is below 1, or a word list is missing or empty.
        """
        for name in ("words", "candidates", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"grounding.{name} must be at least 1, got {getattr(self, name)}")
        _read_words(self.lexicon, "lexicon")
        _read_words(self.stop_words, "stop_words")

    def hashes(self) -> dict[str, str]:
        """What the word lists hold that are given: option → hash of the file."""
        given = {"lexicon": self.lexicon, "stop_words": self.stop_words}
        return {name: file_hash(user_path(path)) for name, path in given.items() if path is not None}


def _read_words(path: str | None, name: str) -> frozenset[str] | None:
    if path is None:
        return None
    try:
        lines = user_path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"grounding.{name} {path}: cannot be read ({error}); give a text file") from error
    words = frozenset(word for line in lines if (word := line.strip().lower()))
    if not words:
        raise ValueError(f"grounding.{name} {path}: has no word; give a file with one word a line, or leave it out")
    return words


def words_of(readout: Readout, U: Tensor, site: str, options: GroundingOptions) -> list[list[str]]:
    """Words of concepts U [K, D] of a site; none for a site whose states are not as wide as the language model's.

    Raises:
        ValueError: The final norm is to be applied, but is neither in the readout nor in a running model.
    """
    if U.shape[1] != readout.unembedding.shape[1]:
        return [[] for _ in U]
    normed = site != "lm.norm" if options.norm is None else options.norm
    if normed and readout.norm is None:
        raise ValueError(
            f"words of {site!r}, a site before the final norm, need the model, because its norm could not be stored; "
            "run with the model instead of `Replay`, or set grounding.norm to false"
        )
    with torch.inference_mode():
        return ground_words(
            U,
            readout.unembedding,
            readout.vocabulary,
            norm=readout.norm if normed else None,
            candidates=options.candidates,
            words=options.words,
            lexicon=_read_words(options.lexicon, "lexicon"),
            stop_words=_read_words(options.stop_words, "stop_words"),
            spans=readout.spans,
        )


def pictures_of(
    V: Tensor, ids: list[str], samples: dict[str, dict[str, Any]], images: int
) -> list[list[dict[str, Any]]]:
    """The samples that activate each concept most.

    Args:
        V: Activations [N, K].
        ids: Sample id of each row [N].
        samples: Sample id → row of the feature store.
        images: Samples per concept.

    Returns:
        For each concept, sample id, picture, what the model said, and the activation, strongest first.
    """
    # Of a sample with several states, the strongest counts: the same picture twice would show nothing more.
    rows_of: dict[str, list[int]] = {}
    for row, sample_id in enumerate(ids):
        rows_of.setdefault(sample_id, []).append(row)
    strength, sample_ids = V.abs(), list(rows_of)
    peaks = torch.stack([strength[rows].amax(dim=0) for rows in rows_of.values()])
    order = ground_images(peaks, min(images, len(sample_ids))).tolist()
    return [
        [_picture(samples, ids, V[:, concept], rows_of[sample_ids[sample]]) for sample in chosen]
        for concept, chosen in enumerate(order)
    ]


def _picture(samples: dict[str, dict[str, Any]], ids: list[str], v: Tensor, rows: list[int]) -> dict[str, Any]:
    """One sample at the strongest of its rows."""
    row = rows[int(v[rows].abs().argmax())]
    sample = samples[ids[row]]
    return {"sample_id": ids[row], "image": sample["image"], "text": sample["text"], "activation": float(v[row])}
