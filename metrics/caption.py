"""CIDEr, BLEU and ROUGE-L of captions, by pycocoevalcap's scorers on the whole set at once."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from torch import Tensor

from .ptb import java_tokenize, ptb_tokenize
from .rows import RowMetric

Tokenizer = Literal["python", "java"]
_TOKENIZERS = {"python": ptb_tokenize, "java": java_tokenize}
# id → captions as strings of tokens; the scorers want a list of one for the prediction.
_Tokenized = dict[str, list[str]]


def caption_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer = "python",
) -> dict[str, float]:
    """Score a set of captions against their references.

    CIDEr weighs n-grams by their rarity over the references of this very set: scores of different sets
    do not compare, and a set of one sample has CIDEr 0.

    Args:
        predictions: id → generated caption.
        references: id → reference captions, at least one; the same ids.
        tokenizer: "python", or "java" for the original PTBTokenizer (needs a JRE).

    Returns:
        "CIDEr" (0..10), "BLEU-1" .. "BLEU-4" and "ROUGE-L" (0..1).

    Raises:
        ValueError: If there is nothing to score, the ids differ, a sample has no reference, all references
            are empty, or the tokenizer is unknown or not available.
    """
    hypotheses, targets = _tokenize(predictions, references, tokenizer)
    bleu, _ = Bleu(4).compute_score(targets, hypotheses, verbose=0)
    scores = {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, start=1)}
    scores["CIDEr"] = float(Cider().compute_score(targets, hypotheses)[0])
    scores["ROUGE-L"] = float(Rouge().compute_score(targets, hypotheses)[0])
    return scores


def caption_scores_per_sample(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer = "python",
) -> dict[str, dict[str, float]]:
    """Score each caption of a set, for intervals over samples.

    The mean over the ids is the score of the set (for CIDEr with the rarity of n-grams taken from the whole
    set). BLEU is no mean over samples and therefore not here.

    Args:
        predictions: id → generated caption.
        references: id → reference captions, at least one; the same ids.
        tokenizer: "python", or "java" for the original PTBTokenizer (needs a JRE).

    Returns:
        "CIDEr" and "ROUGE-L", each id → score.

    Raises:
        ValueError: As `caption_scores`.
    """
    hypotheses, targets = _tokenize(predictions, references, tokenizer)
    scorers = {"CIDEr": Cider(), "ROUGE-L": Rouge()}
    per_sample: dict[str, dict[str, float]] = {}
    for name, scorer in scorers.items():
        _, values = scorer.compute_score(targets, hypotheses)
        per_sample[name] = dict(zip(targets, map(float, values), strict=True))
    return per_sample


def _tokenize(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenizer: Tokenizer
) -> tuple[_Tokenized, _Tokenized]:
    """Check the captions; return the tokenized predictions and references, both sorted by id."""
    if tokenizer not in _TOKENIZERS:
        raise ValueError(f"`tokenizer` must be one of {sorted(_TOKENIZERS)}, got {tokenizer!r}: use 'python'")
    if not predictions or predictions.keys() != references.keys():
        alone = sorted(predictions.keys() ^ references.keys())[:3]
        raise ValueError(
            f"`predictions` and `references` must have the same ids and at least one, got {len(predictions)} and "
            f"{len(references)}, in only one of them {alone}: leave out samples that lack either"
        )
    bare = next((sample_id for sample_id in references if not references[sample_id]), None)
    if bare is not None:
        raise ValueError(f"every sample needs a reference caption, {bare!r} has none: leave it out")
    ids = sorted(predictions)
    hypotheses = _TOKENIZERS[tokenizer]([predictions[i] for i in ids])
    # One call for all references: starting Java costs more than tokenizing.
    flat = iter(_TOKENIZERS[tokenizer]([text for i in ids for text in references[i]]))
    targets = {i: [next(flat) for _ in references[i]] for i in ids}
    if not any(text for texts in targets.values() for text in texts):
        raise ValueError("the references hold no word at all: check the column that the captions are read from")
    return {i: [text] for i, text in zip(ids, hypotheses, strict=True)}, targets


class CaptionScores(RowMetric):
    """The `caption_scores` of all captions that came in, over batches and processes.

    Samples are keyed by id: repeated ones count once, and neither batches nor their order matter.
    `compute` fills `rows` with id → {"text", "references"}.

    Attributes:
        tokenizer: The tokenizer in use, "python" or "java".
    """

    def __init__(self, tokenizer: Tokenizer = "python", **kwargs: Any) -> None:
        """Choose the tokenizer.

        Args:
            tokenizer: "python", or "java" for the original PTBTokenizer (needs a JRE).
            **kwargs: Options of `torchmetrics.Metric`.
        """
        super().__init__(**kwargs)
        self.tokenizer: Tokenizer = tokenizer

    def update(
        self, sample_ids: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> None:
        """Add a batch.

        Args:
            sample_ids: Id of each sample, B of them.
            predictions: The B generated captions.
            references: The reference captions of each of the B samples.

        Raises:
            ValueError: If the three are not equally long.
        """
        self._add(sample_ids, text=predictions, references=[list(texts) for texts in references])

    def compute(self) -> dict[str, Tensor]:
        """Score everything that came in.

        Returns:
            The scores of `caption_scores`, each a float32 scalar.

        Raises:
            ValueError: If nothing came in, an id came with two texts, or as `caption_scores`.
        """
        rows = self._gathered()
        scores = caption_scores(
            {i: row["text"] for i, row in rows.items()},
            {i: row["references"] for i, row in rows.items()},
            self.tokenizer,
        )
        return {name: torch.tensor(value) for name, value in scores.items()}
