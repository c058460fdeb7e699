"""What a concept means: the words its direction decodes to, and the samples that activate it most.

Notation: U [K, D] dictionary, V [N, K] activations, W [T, D] unembedding of T tokens.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache

import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor
from wordfreq import get_frequency_dict

from ._precision import full_precision
from ._validation import as_rows, check_at_least, check_same_width

# One in three million words: rare enough for "surfboard" and "frisbee", and few fragments of words.
_MINIMUM_FREQUENCY = 3e-7
_MINIMUM_LETTERS = 3
# Tokens and concepts at a time: a bfloat16 unembedding is never copied to float32 as a whole, nor all logits held.
_TOKEN_CHUNK = 16_384
_ROW_CHUNK = 256

# Words of several tokens by the first and second of these: the word, and its sub-tokens in one way to write it.
_Spans = dict[int, dict[int, list[tuple[str, tuple[int, ...]]]]]


@cache
def english_lexicon() -> frozenset[str]:
    """Lower-case English words of at least three letters, from the word list installed with `wordfreq`."""
    frequencies = get_frequency_dict("en", wordlist="large")
    return frozenset(
        word for word, frequency in frequencies.items() if frequency >= _MINIMUM_FREQUENCY and _has_shape(word)
    )


def english_stop_words() -> frozenset[str]:
    """English words that say nothing about a concept, from scikit-learn."""
    return frozenset(ENGLISH_STOP_WORDS)


@full_precision
def ground_words(
    U: Tensor,
    unembedding: Tensor,
    vocabulary: Sequence[str],
    norm: Callable[[Tensor], Tensor] | None = None,
    candidates: int = 50,
    words: int = 10,
    lexicon: Collection[str] | None = None,
    stop_words: Collection[str] | None = None,
    spans: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> list[list[str]]:
    """Words of each concept: the admissible ones among the tokens with the largest logits U Wᵀ.

    CoX-LMM (arXiv 2406.08074, section 3). A token is admissible if it is, stripped and in lower case, an
    English word of at least three letters and no stop word. The candidates are taken from all tokens and
    filtered afterwards, so a concept that decodes to no words has an empty list.

    A word of several tokens is admissible under the same conditions if all its sub-tokens are candidates. Its logit
    is their mean, and where it is listed, none of them is listed on its own.

    Args:
        U: concepts, [K, D].
        unembedding: W, [T, D]; the logits are computed in float32, whatever its dtype.
        vocabulary: the decoded string of each of the T tokens.
        norm: the model's final norm, for concepts of a site before it; called on U in the dtype and on the device
            of the unembedding.
        candidates: tokens looked at for each concept (15 in the paper, 50 in its code, 200 for shifts).
        words: words kept for each concept, at most.
        lexicon: admissible words, lower case; `english_lexicon()` if not given.
        stop_words: words left out; `english_stop_words()` if not given.
        spans: words of several tokens, lower case, with the ids of the sub-tokens of each way to write them.

    Returns:
        K lists of distinct words, largest logit first.

    Raises:
        ValueError: if the widths of `U` and `unembedding` differ, the vocabulary is empty or has not one string a
            token, no word of the lexicon is admissible, a span names a token that does not exist, a matrix is not
            finite, or `candidates` or `words` is below 1.
    """
    check_at_least(candidates, 1, "candidates")
    check_at_least(words, 1, "words")
    U = as_rows(U, "U")
    check_same_width(U, unembedding, ("U", "unembedding"))
    if not vocabulary:
        raise ValueError("`vocabulary` must have the decoded string of every token, but it is empty")
    if len(vocabulary) != len(unembedding):
        raise ValueError(
            f"`vocabulary` must have one string for each of the {len(unembedding)} rows of `unembedding`, "
            f"got {len(vocabulary)}: decode every id below {len(unembedding)}"
        )
    admissible = _admissible(lexicon, stop_words)
    single = {token: word for token, text in enumerate(vocabulary) if (word := text.strip().lower()) in admissible}
    several = _admissible_spans(spans, admissible, len(vocabulary))
    return [_ranked_words(logits, single, several, words) for logits in _top_tokens(U, unembedding, norm, candidates)]


def _admissible(lexicon: Collection[str] | None, stop_words: Collection[str] | None) -> set[str]:
    lexicon = english_lexicon() if lexicon is None else lexicon
    admissible = {word for word in lexicon if _has_shape(word)}
    admissible -= english_stop_words() if stop_words is None else set(stop_words)
    if not admissible:
        raise ValueError(
            f"`lexicon` must have an English word of at least {_MINIMUM_LETTERS} letters that is no stop word, but "
            f"none of its {len(lexicon)} entries is one: give a longer list, or none for the installed one"
        )
    return admissible


def _admissible_spans(spans: Mapping[str, Sequence[Sequence[int]]] | None, admissible: set[str], tokens: int) -> _Spans:
    """Spans of admissible words by their first tokens: a concept has few candidates, a vocabulary tens of thousands."""
    kept = [(word, tuple(span)) for word, ways in (spans or {}).items() if word in admissible for span in ways]
    for word, span in kept:
        if not span or min(span) < 0 or max(span) >= tokens:
            raise ValueError(f"`spans` must name tokens below {tokens}, got {span} for '{word}': use one tokenizer")
    by_first: _Spans = {}
    for word, span in kept:
        by_first.setdefault(span[0], {}).setdefault(span[min(1, len(span) - 1)], []).append((word, span))
    return by_first


def _ranked_words(logits: Mapping[int, float], single: Mapping[int, str], several: _Spans, words: int) -> list[str]:
    """The admissible words of one concept with the largest logits, from those of its candidates (id → logit)."""
    found: list[tuple[float, str, tuple[int, ...]]] = [
        (logit, single[token], (token,)) for token, logit in logits.items() if token in single
    ]
    candidates = set(logits)
    found += [
        (sum(logits[token] for token in span) / len(span), word, span)
        for first in logits
        if (spans := several.get(first))
        for second in spans.keys() & candidates
        for word, span in spans[second]
        if candidates.issuperset(span)
    ]
    listed: dict[str, tuple[int, ...]] = {}
    consumed: set[int] = set()
    for _, word, span in sorted(found, key=lambda entry: (-entry[0], len(entry[2]), entry[2])):
        if len(listed) == words:
            break
        if word in listed or (len(span) == 1 and span[0] in consumed):
            continue
        if len(span) > 1:
            consumed.update(span)
            listed = {known: tokens for known, tokens in listed.items() if len(tokens) > 1 or tokens[0] not in span}
        listed[word] = span
    return list(listed)


def _top_tokens(
    U: Tensor, unembedding: Tensor, norm: Callable[[Tensor], Tensor] | None, candidates: int
) -> list[dict[int, float]]:
    """Logits of the tokens with the largest ones by id, best first, ties by id: K mappings of `candidates` at most."""
    tops: list[dict[int, float]] = []
    for rows in torch.split(U, _ROW_CHUNK):
        states = rows.to(unembedding)
        states = as_rows(states if norm is None else norm(states), "norm(U)")
        logits = torch.cat([states @ chunk.float().T for chunk in torch.split(unembedding, _TOKEN_CHUNK)], dim=1)
        tops += _largest(as_rows(logits, "logits"), candidates)
    return tops


def _largest(logits: Tensor, count: int) -> list[dict[int, float]]:
    """The largest values of each row by column, largest first, ties by column."""
    count = min(count, logits.shape[1])
    values, columns = logits.topk(count, dim=1)
    # Which of equal values are among the largest is not defined by `topk`; there all are sorted.
    tied = (logits >= values[:, -1:]).sum(dim=1) > count
    if bool(tied.any()):
        ordered = logits[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = ordered.values[:, :count], ordered.indices[:, :count]
    by_column = columns.argsort(dim=1)
    by_value = values.gather(1, by_column).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, by_column).gather(1, by_value.indices)
    return [dict(zip(*row, strict=True)) for row in zip(columns.tolist(), by_value.values.tolist(), strict=True)]


def _has_shape(word: str) -> bool:
    return len(word) >= _MINIMUM_LETTERS and word.isascii() and word.isalpha()


def ground_images(V: Tensor, images: int = 5) -> Tensor:
    """Samples that activate each concept most, by |v_k| (CoX-LMM, section 3).

    Args:
        V: activations, [N, K].
        images: samples for each concept (5 in the paper; 50 for recovery).

    Returns:
        Row indices, [K, images], int64, strongest first, ties by row; a dead concept ties everywhere.

    Raises:
        ValueError: if `V` is no finite floating matrix, or has fewer rows than `images`.
    """
    check_at_least(images, 1, "images")
    V = as_rows(V, "V")
    if images > len(V):
        raise ValueError(f"`images` must be at most the number of samples, {len(V)}, got {images}")
    return V.T.abs().sort(dim=1, descending=True, stable=True).indices[:, :images]
