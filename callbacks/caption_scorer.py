"""Scores captions while a model is validated, tested, or read."""

from __future__ import annotations

from typing import Any, Literal

from ..datamodules.sample import Batch
from ..datamodules.word_classes import word_class
from ..metrics import CaptionScores, Measure, ScoreName, check_scores, java_tokenize, text_measures, word_share_measure
from .scorer import Rows, Scorer


class CaptionScorer(Scorer):
    """Scores of the whole set, the share of captions with a word of a class, their length and repetition.

    Args:
        out: JSON file to write: scores with 95 % intervals, captions with their references and values, skipped samples;
            by default `captions.json` in the run's folder, if it has one, and not while a model is trained.
        words: Word class of the share: `colors`, `places`, `sentiments`, or a list of words.
        tokenizer: `python`, or `java` for the Penn Treebank tokenizer that pycocoevalcap calls.
        measures: Some of `CIDEr`, `BLEU`, `ROUGE-L`, `METEOR` (needs Java) and `SPICE` (needs Java and files of
            Stanford CoreNLP).
        baseline: File that a CaptionScorer wrote for another run, usually the unsteered one: what has changed since
            then is written too.
        variant: Whose captions to score in `predict`: `original`, or the name of a destination.
    """

    place = "captions{variant}.json"

    def __init__(
        self,
        out: str | None = None,
        words: str | list[str] = "colors",
        tokenizer: Literal["python", "java"] = "python",
        measures: tuple[ScoreName, ...] = ("CIDEr", "BLEU", "ROUGE-L"),
        baseline: str | None = None,
        variant: str = "original",
    ) -> None:
        super().__init__(CaptionScores(tokenizer, measures), "caption", "text", out, baseline, variant)
        self.tokenizer = tokenizer
        self.scores = measures
        self.words = word_class(words)

    def prepare(self) -> None:
        """Read the baseline; make sure that what the scores need is installed."""
        super().prepare()
        check_scores(self.scores)
        if self.tokenizer == "java":
            java_tokenize([])  # an error where there is no Java

    def add(self, batch: Batch, texts: list[str]) -> None:
        """Give one batch of captions to the metric."""
        assert isinstance(self.metric, CaptionScores)
        self.metric.update(batch.sample_ids, texts, [sample.references for sample in batch.samples])

    def measures(self, rows: Rows) -> dict[str, Measure]:
        """The scores, and what is seen in the captions alone."""
        texts = {sample_id: self.said(row) for sample_id, row in rows.items()}
        return {**super().measures(rows), "word_share": word_share_measure(texts, self.words), **text_measures(texts)}

    def values(self, measures: dict[str, Measure]) -> dict[str, Measure]:
        """All but BLEU, which single captions do not have."""
        return {name: measure for name, measure in measures.items() if not name.startswith("BLEU")}

    def summary(self, rows: Rows) -> dict[str, Any]:
        """Which tokenizer was used, and which words were looked for."""
        return {"tokenizer": self.tokenizer, "words": sorted(self.words)}
