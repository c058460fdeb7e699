"""CIDEr, BLEU, ROUGE-L, METEOR and SPICE of captions, by pycocoevalcap's scorers on the whole set at once."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .bootstrap import Measure
from .caption_scorers import SCORERS, CaptionScore, ScoreName, Tokenized, check_scores
from .ptb import java_tokenize, ptb_tokenize
from .rows import Record, RowMetric

Tokenizer = Literal["python", "java"]
DEFAULT_SCORES: tuple[ScoreName, ...] = ("CIDEr", "BLEU", "ROUGE-L")
_TOKENIZERS = {"python": ptb_tokenize, "java": java_tokenize}


def caption_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer = "python",
    scores: Sequence[ScoreName] = DEFAULT_SCORES,
) -> dict[str, float]:
    """Score a set of captions against their references.

    CIDEr weighs n-grams by their rarity over the references of this very set: scores of different sets
    do not compare, and a set of one sample has CIDEr 0.

    Args:
        predictions: id → generated caption.
        references: id → reference captions, at least one; the same ids.
        tokenizer: "python", or "java" for the original PTBTokenizer (needs a JRE).
        scores: Which ones; "METEOR" and "SPICE" run in Java, SPICE with files that are not in pycocoevalcap.

    Returns:
        "CIDEr" (0..10), "BLEU-1" .. "BLEU-4", "ROUGE-L", "METEOR", "SPICE" (0..1), as far as wanted.

    Raises:
        ValueError: If there is nothing to score, the ids differ, a sample has no reference, all references
            are empty, or the tokenizer or a score is unknown or not available.
    """
    return {name: score.value for name, score in _score(predictions, references, tokenizer, scores).items()}


def caption_measures(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer = "python",
    scores: Sequence[ScoreName] = DEFAULT_SCORES,
) -> dict[str, Measure]:
    """Return the `caption_scores` as measures, for intervals.

    Resamples keep the rarity of n-grams that the whole set has. BLEU is computed anew for each, as it is for a set.
    The statistics of the others begin with the score of each caption. METEOR of a set is no mean of them: its interval
    is that of the mean, shifted to the score of the set. SPICE is the mean of those captions that have one.

    Args:
        predictions: id → generated caption.
        references: id → reference captions, at least one; the same ids.
        tokenizer: "python", or "java" for the original PTBTokenizer (needs a JRE).
        scores: Which ones.

    Raises:
        ValueError: As `caption_scores`.
    """
    return {name: score.measure for name, score in _score(predictions, references, tokenizer, scores).items()}


def _score(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer,
    scores: Sequence[ScoreName],
) -> dict[str, CaptionScore]:
    check_scores(scores)
    hypotheses, targets = _tokenize(predictions, references, tokenizer)
    return {name: score for chosen in scores for name, score in SCORERS[chosen](targets, hypotheses).items()}


def _tokenize(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenizer: Tokenizer
) -> tuple[Tokenized, Tokenized]:
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
        scores: The scores in use.
    """

    def __init__(
        self, tokenizer: Tokenizer = "python", scores: Sequence[ScoreName] = DEFAULT_SCORES, **kwargs: Any
    ) -> None:
        """Choose the tokenizer and the scores.

        Args:
            tokenizer: "python", or "java" for the original PTBTokenizer (needs a JRE).
            scores: Which ones of "CIDEr", "BLEU", "ROUGE-L", "METEOR" and "SPICE".
            **kwargs: Options of `torchmetrics.Metric`.
        """
        super().__init__(**kwargs)
        self.tokenizer: Tokenizer = tokenizer
        self.scores = tuple(scores)

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

    def measures(self, rows: Mapping[str, Record]) -> dict[str, Measure]:
        """Return the `caption_measures` of rows.

        Raises:
            ValueError: As `caption_scores`.
        """
        predictions = {i: row["text"] for i, row in rows.items()}
        references = {i: row["references"] for i, row in rows.items()}
        return caption_measures(predictions, references, self.tokenizer, self.scores)
