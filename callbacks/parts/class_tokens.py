"""Which tokens of a model say a class of objects, where a single token has to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ...datamodules.object_names import ObjectNames
from ...lightning_modules import VisionLanguageModel

# A beginning of fewer letters says nothing.
_LETTERS = 3


@dataclass(frozen=True)
class ClassTokens:
    """The tokens of a class.

    Attributes:
        strict: Those of its own name.
        lenient: Those of its synonyms, too.
    """

    strict: frozenset[int]
    lenient: frozenset[int]


def class_tokens(backbone: VisionLanguageModel, names: ObjectNames) -> dict[str, ClassTokens]:
    """Find the tokens that say each class.

    A word counts with and without a space before it, in small letters, with a capital and in capitals: by its token, or
    by its first sub-token if that has at least three of its letters. Of a name of several words (traffic light) each
    counts that has three letters; synonyms of several words do not. A token that is all of a word of one class counts
    for that class alone, so that "dog" does not say hot dog; else one that begins words of several classes counts for
    none.

    Args:
        backbone: The model.
        names: How texts name the classes.

    Returns:
        Class → tokens; both sets may be empty.
    """
    strict, lenient = (
        {name: _tokens(backbone, ways(name), names.words(name)[0]) for name in names.categories}
        for ways in (names.strict, names.words)
    )
    claims: dict[int, dict[bool, set[str]]] = {}
    for name, tokens in lenient.items():
        for token, whole in tokens.items():
            claims.setdefault(token, {True: set(), False: set()})[whole].add(name)
    # Those who say all of it come first; more than one are none.
    owners = {token: claimed[True] or claimed[False] for token, claimed in claims.items()}
    return {
        name: ClassTokens(
            *(frozenset(token for token in found[name] if owners[token] == {name}) for found in (strict, lenient))
        )
        for name in names.categories
    }


def _tokens(backbone: VisionLanguageModel, phrases: Iterable[str], name: str) -> dict[int, bool]:
    """The tokens of some ways to say a class, and whether each is all of one."""
    found: dict[int, bool] = {}
    for phrase in phrases:
        words = phrase.split()
        if len(words) > 1:
            words = [word for word in words if len(word) >= _LETTERS and phrase == name]
        for word in words:
            for token, whole in _beginnings(backbone, word):
                found[token] = found.get(token, False) or (whole and word == phrase)
    return found


def _beginnings(backbone: VisionLanguageModel, word: str) -> Iterator[tuple[int, bool]]:
    """The first sub-tokens of a word, as far as they tell it, and whether each is all of it."""
    for written in (word, word.capitalize(), word.upper()):
        for text in (written, f" {written}"):
            for token in backbone.tokenizer.encode(text, add_special_tokens=False):
                said = backbone.vocabulary[token].strip().lower()
                # Some tokenizers begin with a blank of its own.
                if said:
                    if word.startswith(said) and len(said) >= min(_LETTERS, len(word)):
                        yield token, said == word
                    break
