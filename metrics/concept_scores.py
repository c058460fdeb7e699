"""How well the words of a sample's strongest concepts fit its picture and its captions (CoX-LMM, arXiv 2406.08074).

Top r: the mean over those of the r concepts with the largest |v_k| that are active at all, each scored by itself. Of a
sample that activates no concept, or one without words, nothing is said: 0.

Notation: N samples, K concepts, V [N, K] activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from .bert import BertScorer
from .clip import ClipEncoder, clip_score

Values = list[float | None]
"""One value per sample; nothing where it is not defined."""

Columns = dict[str, dict[str, Values]]
"""Score → method → values."""

CAPTIONS = "Ground-truth captions"
"""The method that is an upper bound: the samples' own captions."""


@dataclass(frozen=True)
class GroundedConcepts:
    """What a dictionary says of N samples.

    Attributes:
        words: Words of each of the K concepts.
        V: Activations [N, K].
    """

    words: list[list[str]]
    V: Tensor

    def strongest(self, top: int) -> Tensor:
        """The concepts with the largest |v_k| of each sample, [N, min(top, K)], strongest first, ties by concept."""
        return self.V.abs().sort(dim=1, descending=True, stable=True).indices[:, :top]

    @property
    def inactive(self) -> int:
        """How many samples activate no concept."""
        return int((self.V == 0).all(dim=1).sum())

    def named(self, top: int) -> list[list[int]]:
        """The strongest concepts of each sample that are active."""
        strongest = self.strongest(top)
        return [
            [concept for concept, is_active in zip(*row, strict=True) if is_active]
            for row in zip(strongest.tolist(), self.activity(strongest).tolist(), strict=True)
        ]

    def activity(self, strongest: Tensor) -> Tensor:
        """Whether the concepts [N, top] are active in their samples, [N, top]."""
        return self.V.gather(1, strongest) != 0


def description(words: Sequence[str]) -> str:
    """The text that stands for a concept in CLIPScore."""
    return f"A photo is described by the words {', '.join(words)}."


def concept_clip_scores(
    concepts: GroundedConcepts, images: Tensor, encoder: ClipEncoder, tops: Sequence[int]
) -> dict[int, Values]:
    """CLIPScore of pictures and what their strongest concepts say.

    Args:
        concepts: The grounded concepts.
        images: Embedded pictures [N, E].
        encoder: Embeds the concepts' descriptions.
        tops: Numbers of concepts.

    Returns:
        For each number of concepts the N scores.
    """
    strongest = concepts.strongest(max(tops))
    E = encoder.texts([description(words) for words in concepts.words])
    worded = torch.tensor([bool(words) for words in concepts.words])
    columns = [clip_score(images, E[concept]) * worded[concept] for concept in strongest.T]
    return _means(torch.stack(columns, dim=1), concepts.activity(strongest), tops)


def concept_bert_scores(
    concepts: GroundedConcepts, references: Sequence[Sequence[str]], scorer: BertScorer, tops: Sequence[int]
) -> dict[int, Values]:
    """BERTScore F1 of the strongest concepts' words against captions.

    Args:
        concepts: The grounded concepts.
        references: Captions of each of the N samples; one without any has no value.
        scorer: Scores texts.
        tops: Numbers of concepts.

    Returns:
        For each number of concepts the N scores.
    """
    known = [sample for sample, captions in enumerate(references) if captions]
    strongest = concepts.strongest(max(tops))
    active, strongest = concepts.activity(strongest)[known], strongest[known]
    texts = [", ".join(concepts.words[concept]) for row in strongest.tolist() for concept in row]
    captions = [references[sample] for sample in known for _ in range(strongest.shape[1])]
    found = _means(scorer.f1(texts, captions).view(strongest.shape), active, tops)
    return {top: _spread(values, known, len(references)) for top, values in found.items()}


def score_columns(
    methods: Mapping[str, GroundedConcepts],
    pictures: Iterable[Image.Image],
    references: Sequence[Sequence[str]],
    tops: Sequence[int],
    clip: ClipEncoder | None = None,
    bert: BertScorer | None = None,
) -> Columns:
    """Score several methods, and the samples' own captions, on the same samples.

    Args:
        methods: Method → its grounded concepts.
        pictures: The N pictures; read once, and only where there is a CLIP model.
        references: The captions of each sample, if any.
        tops: Numbers of concepts.
        clip: For CLIPScore; without it there is none.
        bert: For BERTScore; without it there is none.

    Returns:
        "CLIPScore top-r" and "BERTScore top-r" for each number of concepts. Captions have no strongest among them and
        the same values in each.

    Raises:
        ValueError: If BERTScore is asked for and no sample has a caption.
    """
    found: dict[str, dict[str, dict[int, Values]]] = {}
    if clip is not None:
        images = clip.images(pictures)
        found["CLIPScore"] = {
            name: concept_clip_scores(concepts, images, clip, tops) for name, concepts in methods.items()
        }
        if any(references):
            found["CLIPScore"][CAPTIONS] = dict.fromkeys(tops, caption_clip_scores(references, images, clip))
    if bert is not None:
        if not any(references):
            raise ValueError(
                "`bert_model`: no test sample has reference captions, with which it compares; leave it out"
            )
        found["BERTScore"] = {
            name: concept_bert_scores(concepts, references, bert, tops) for name, concepts in methods.items()
        }
        found["BERTScore"][CAPTIONS] = dict.fromkeys(tops, caption_bert_scores(references, bert))
    return {
        f"{score} top-{top}": {name: values[top] for name, values in by_method.items()}
        for score, by_method in found.items()
        for top in tops
    }


def caption_clip_scores(references: Sequence[Sequence[str]], images: Tensor, encoder: ClipEncoder) -> Values:
    """CLIPScore of pictures and their own captions, the mean over the captions of each of the N samples."""
    texts = list(dict.fromkeys(caption for captions in references for caption in captions))
    E = encoder.texts(texts)
    row = {text: index for index, text in enumerate(texts)}
    return [
        float(clip_score(image.expand(len(captions), -1), E[[row[caption] for caption in captions]]).mean())
        if captions
        else None
        for image, captions in zip(images, references, strict=True)
    ]


def caption_bert_scores(references: Sequence[Sequence[str]], scorer: BertScorer) -> Values:
    """BERTScore F1 of one caption against the others of its sample, the mean over the captions of each sample.

    A sample with fewer than two captions has no value.
    """
    known = [sample for sample, captions in enumerate(references) if len(captions) > 1]
    texts = [caption for sample in known for caption in references[sample]]
    others = [
        [*references[sample][:place], *references[sample][place + 1 :]]
        for sample in known
        for place in range(len(references[sample]))
    ]
    parts = torch.split(scorer.f1(texts, others), [len(references[sample]) for sample in known])
    return _spread([float(part.mean()) for part in parts], known, len(references))


def _means(scores: Tensor, active: Tensor, tops: Sequence[int]) -> dict[int, Values]:
    """For each number of concepts the means over as many columns of scores [N, R], of those that are active."""
    sums, counts = (scores * active).cumsum(dim=1), active.cumsum(dim=1).clamp(min=1)
    return {top: (sums / counts)[:, min(top, scores.shape[1]) - 1].tolist() for top in tops}


def _spread(values: Sequence[float | None], samples: Sequence[int], count: int) -> Values:
    """Values of some samples as a column of all."""
    column: Values = [None] * count
    for sample, value in zip(samples, values, strict=True):
        column[sample] = value
    return column
