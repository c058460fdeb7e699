"""The readout: how states become words, taken from a model or from a folder that one was written to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from torch import Tensor

from ...concepts import english_lexicon, load_artifact, save_artifact
from ...records.files import write_whole
from .norm_form import NormForm

if TYPE_CHECKING:
    from .model import VisionLanguageModel

_TENSORS, _VOCABULARY, _SPANS = "readout.safetensors", "vocabulary.parquet", "spans.parquet"

Spans = dict[str, list[list[int]]]


@dataclass(frozen=True, eq=False)
class Readout:
    """All that grounding concepts in words needs of a model.

    Attributes:
        unembedding: W_U [T, D], in the model's own dtype.
        vocabulary: The decoded string of each of the T tokens.
        spans: English words of several tokens, with the ids of the sub-tokens of each way to write them.
        norm: The final norm; none where it is of no known form and the model is not there.
        weights_hash: Which model this is of, as in the metadata of a feature store.
    """

    unembedding: Tensor
    vocabulary: list[str]
    spans: Spans
    norm: Callable[[Tensor], Tensor] | None
    weights_hash: str

    @classmethod
    def from_model(cls, backbone: VisionLanguageModel) -> Readout:
        """The readout of a loaded model; its tensors are the model's own."""
        weight = backbone.unembed.weight
        assert isinstance(weight, Tensor)
        weight = weight.detach()
        form = NormForm.of(backbone.final_norm, weight.shape[1], weight.dtype)
        return cls(
            unembedding=weight,
            vocabulary=backbone.vocabulary,
            spans=word_spans(backbone.tokenizer, backbone.vocabulary, english_lexicon()),
            norm=backbone.final_norm if form is None else form.to(weight.device),
            weights_hash=backbone.weights_hash(),
        )

    def save(self, folder: Path) -> None:
        """Write the readout to a folder: tensors, vocabulary, and words of several tokens, each whole or not at all.

        A norm of no known form is left out.
        """
        norm = self.norm if isinstance(self.norm, NormForm) else None
        vectors = {} if norm is None else {"norm.weight": norm.weight, "norm.bias": norm.bias}
        tensors = {name: value for name, value in vectors.items() if value is not None}
        form = None if norm is None else {"eps": norm.eps, "centered": norm.centered, "offset": norm.offset}
        metadata = {"norm": form, "weights_hash": self.weights_hash}
        rows = [{"word": word, "tokens": tokens} for word, ways in self.spans.items() for tokens in ways]
        spans = pa.Table.from_pylist(rows, pa.schema([("word", pa.string()), ("tokens", pa.list_(pa.int32()))]))
        vocabulary = pa.table({"token": pa.array(self.vocabulary, pa.string())})
        write_whole(folder / _SPANS, lambda working: pq.write_table(spans, working))
        write_whole(folder / _VOCABULARY, lambda working: pq.write_table(vocabulary, working))
        # The tensors come last: they say that the rest is there.
        tensors["unembedding"] = self.unembedding
        write_whole(folder / _TENSORS, lambda working: save_artifact(working, "readout", tensors, metadata))

    @classmethod
    def load(cls, folder: Path) -> Readout:
        """Read what `save` wrote, on the CPU.

        Raises:
            ValueError: The folder has no readout, or a damaged one.
        """
        if not (folder / _TENSORS).is_file():
            raise ValueError(
                f"{folder}: has no {_TENSORS}, without which concepts have no words; extract it again, or run with the "
                "model instead of `Replay`"
            )
        tensors, metadata = load_artifact(folder / _TENSORS, "readout")
        spans: Spans = {}
        for row in _read_table(folder / _SPANS):
            spans.setdefault(row["word"], []).append(row["tokens"])
        norm = metadata["norm"]
        return cls(
            unembedding=tensors["unembedding"],
            vocabulary=[row["token"] for row in _read_table(folder / _VOCABULARY)],
            spans=spans,
            norm=None if norm is None else NormForm(tensors.get("norm.weight"), tensors.get("norm.bias"), **norm),
            weights_hash=metadata["weights_hash"],
        )


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: missing or damaged ({str(error).splitlines()[0]}); extract again") from error
    return rows


def word_spans(tokenizer: Any, vocabulary: Sequence[str], lexicon: Collection[str]) -> Spans:
    """Words that a tokenizer writes with several tokens, after a space or at the start of a text.

    Args:
        tokenizer: The model's tokenizer.
        vocabulary: The decoded string of each of its tokens.
        lexicon: Lower-case words.

    Returns:
        Word → the token ids of each way to write it, without blank tokens; every sequence decodes to its word. Words
        that are one token in both ways are not there.
    """
    blank = frozenset(token for token, text in enumerate(vocabulary) if not text.strip())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return _fast_spans(backend.to_str(), blank, frozenset(lexicon))
    return _spans(
        lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"], tokenizer.batch_decode, blank, lexicon
    )


@lru_cache(maxsize=1)
def _fast_spans(tokenizer: str, blank: frozenset[int], lexicon: frozenset[str]) -> Spans:
    """The same of a tokenizer given as JSON; remembered, because one process may run a model several times."""
    # A copy: the model's own may be set to pad. Without the wrapper around it, which takes longer than it does.
    fast = Tokenizer.from_str(tokenizer)
    fast.no_padding()
    fast.no_truncation()
    return _spans(
        lambda texts: [encoding.ids for encoding in fast.encode_batch(texts, add_special_tokens=False)],
        fast.decode_batch,
        blank,
        lexicon,
    )


def _spans(
    encode: Callable[[list[str]], list[list[int]]],
    decode: Callable[[list[list[int]]], list[str]],
    blank: Collection[int],
    lexicon: Collection[str],
) -> Spans:
    words = sorted(lexicon) * 2
    texts = [word if number < len(lexicon) else f" {word}" for number, word in enumerate(words)]
    # SentencePiece puts a token for the space before one that has a space itself.
    written = [[token for token in ids if token not in blank] for ids in encode(texts)]
    spans: Spans = {}
    for word, ids, text in zip(words, written, decode(written), strict=True):
        if len(ids) > 1 and text.strip().lower() == word and ids not in spans.setdefault(word, []):
            spans[word].append(ids)
    return spans
