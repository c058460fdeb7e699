"""BERTScore: how close the tokens of a text are to those of a reference (arXiv 1904.09675).

torchmetrics has a `bert_score`, but release 1.9 gives the scores of several texts in a wrong order, mixed between pairs
(torchmetrics issue 2728); for one pair at a time the two agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer

from ..records.paths import located
from .encoders import load_whole


class BertScorer:
    """Scores texts against references by the last hidden states of an encoder such as BERT or RoBERTa.

    No weighting by rarity and no rescaling. Remote code is never run.

    Args:
        model: Folder in the Hugging Face layout, or hub id.
        device: Where the model runs.
        batch_size: Texts at a time; changes no result.

    Raises:
        ValueError: `model` holds no text encoder with its tokenizer.
    """

    def __init__(self, model: str, device: torch.device | str = "cpu", batch_size: int = 64) -> None:
        try:
            place = located(model, "folder", owned=False)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(place)
            # Checkpoints of masked language models have no pooler, and no score needs one.
            self._model: Any = load_whole(place, needless="pooler.").to(device).eval()
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise _no_bert(model, " ".join(str(error).split())) from error
        positions = getattr(self._model.config, "max_position_embeddings", None)
        if positions is None:
            raise _no_bert(model, f"it holds a {type(self._model).__name__}")
        self._device = device
        self._batch_size = batch_size
        # RoBERTa has two positions more than it takes tokens; its tokenizer knows.
        self._length = min(positions, self._tokenizer.model_max_length)

    def f1(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
        """Score each text against its references and keep the best.

        Args:
            texts: N texts; one without any token scores 0.
            references: For each text its references, at least one.

        Returns:
            F1 [N], in 0..1.

        Raises:
            ValueError: If the lengths differ or a text has no reference.
        """
        if len(texts) != len(references) or not all(references):
            raise ValueError(
                f"`references` must hold at least one reference for each of the {len(texts)} texts, got "
                f"{[len(found) for found in references][:5]}...: leave out texts without reference"
            )
        scores: list[float] = []
        # One batch of pairs at a time, so that memory does not grow with N; what repeats in it is embedded once.
        for start in range(0, len(texts), self._batch_size):
            span = slice(start, start + self._batch_size)
            here = list(zip(texts[span], references[span], strict=True))
            tokens = self._embed([text for pair in here for text in (pair[0], *pair[1])])
            scores += [max(_f1(tokens[text], tokens[other]) for other in others) for text, others in here]
        return torch.tensor(scores)

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Text → its tokens without the special ones, [tokens, D], of unit length."""
        # Sorted by length, a batch has little padding.
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        tokens: dict[str, Tensor] = {}
        for start in range(0, len(distinct), self._batch_size):
            batch = distinct[start : start + self._batch_size]
            inputs = self._tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=self._length,
                return_special_tokens_mask=True,
                return_tensors="pt",
            )
            # Padding counts as special.
            keep = ~inputs.pop("special_tokens_mask").bool()
            states = self._model(**inputs.to(self._device)).last_hidden_state.float().cpu()
            states = torch.nn.functional.normalize(states, dim=-1)
            tokens.update({text: state[kept] for text, state, kept in zip(batch, states, keep, strict=True)})
        return tokens


def _f1(candidate: Tensor, reference: Tensor) -> float:
    """F1 of greedy matching; candidate [T, D], reference [R, D], rows of unit length."""
    if not len(candidate) or not len(reference):
        return 0.0
    similarity = (candidate @ reference.T).clamp(min=0)
    precision = float(similarity.amax(dim=1).mean())
    recall = float(similarity.amax(dim=0).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _no_bert(model: str, reason: str) -> ValueError:
    return ValueError(
        f"bert_model {model!r}: no text encoder can be loaded from it ({reason}); give a folder in the Hugging Face "
        "layout or a hub id, e.g. roberta-large"
    )
