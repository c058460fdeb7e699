"""Scores captions while a model is validated."""

from __future__ import annotations

from typing import Any, Literal

from ..datamodules.sample import Batch
from ..datamodules.word_classes import word_class
from ..metrics import CaptionScores, word_share
from .scorer import Scorer


class CaptionScorer(Scorer):
    """CIDEr, BLEU and ROUGE-L of the whole set, and the share of captions with a word of a class.

    Args:
        out: JSON file to write: scores, captions with their references, skipped samples.
        words: Word class of the share: `colors`, `places`, `sentiments`, or a list of words.
        tokenizer: `python`, or `java` for the Penn Treebank tokenizer that pycocoevalcap calls.
    """

    def __init__(
        self,
        out: str | None = None,
        words: str | list[str] = "colors",
        tokenizer: Literal["python", "java"] = "python",
    ) -> None:
        super().__init__(CaptionScores(tokenizer), "caption", out)
        self.tokenizer = tokenizer
        self.words = word_class(words)

    def add(self, batch: Batch, texts: list[str]) -> None:
        """Give one batch of captions to the metric."""
        assert isinstance(self.metric, CaptionScores)
        self.metric.update(batch.sample_ids, texts, [sample.references for sample in batch.samples])

    def summary(self, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The share, and which tokenizer was used."""
        texts = [row["text"] for row in rows.values()]
        return {"word_share": word_share(texts, self.words), "tokenizer": self.tokenizer}
