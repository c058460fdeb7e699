"""Word classes that captions are filtered by and positions are selected with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..records.paths import user_path

WORD_CLASSES: dict[str, frozenset[str]] = {
    "colors": frozenset(
        """amber aqua azure beige black blond blonde blue bronze brown burgundy charcoal copper cream crimson cyan
        gold golden gray green grey indigo ivory khaki lavender lime magenta maroon mauve navy olive orange peach
        pink purple red rose scarlet silver tan teal turquoise violet white yellow""".split()
    ),
    "places": frozenset(
        """airport alley bathroom beach bedroom bridge building city classroom coast court desert farm field forest
        garden harbor highway hill hotel house jungle kitchen lake library market meadow mountain museum ocean
        office park parking pasture playground pool restaurant river road room school sea shop sidewalk space
        stadium station store street temple town village yard zoo""".split()
    ),
    "sentiments": frozenset(
        """adorable amazing angry awesome awful bad beautiful bored boring calm charming cheerful crazy creepy cute
        dangerous delicious disgusting dreary elegant evil excited fantastic fierce funny gloomy good gorgeous great
        happy hideous horrible joyful lonely lovely mad miserable mysterious nasty nice peaceful playful pleasant
        poor pretty proud rough sad scary serene shy silly stupid terrible tired ugly weird wonderful""".split()
    ),
}

_WORD = re.compile(r"[^\W\d_]+")
_ONE_WORD = "give single words of letters alone, for texts are cut at everything else"


def word_class(words: str | Iterable[str]) -> frozenset[str]:
    """The words of a class, in lower case.

    Args:
        words: `colors`, `places` or `sentiments`; a path ending in `.txt`, of a file with one word a line; or the
            words themselves.

    Raises:
        ValueError: No class has that name, there is no word, or one that no text has: words are of letters alone.
        OSError: The file cannot be read.
    """
    if isinstance(words, str):
        if words.endswith(".txt"):
            return _read_words(user_path(words))
        if words not in WORD_CLASSES:
            names = ", ".join(sorted(WORD_CLASSES))
            raise ValueError(
                f"no word class {words!r}; there are {names} (conceptshift.datamodules.WORD_CLASSES lists their "
                "words), or give a list of words, or the path of a .txt file with one word a line"
            )
        return WORD_CLASSES[words]
    listed = frozenset(word.lower() for word in words)
    if not listed:
        raise ValueError("a word class needs at least one word, got an empty list")
    for word in sorted(listed):
        if not _WORD.fullmatch(word):
            raise ValueError(f"word list: {word!r} would never be found; {_ONE_WORD}")
    return listed


def has_word(text: str, words: frozenset[str] | None) -> bool:
    """Whether one of the words stands in the text, as a whole word; without `words` any text will do."""
    return words is None or not words.isdisjoint(_WORD.findall(text.lower()))


def first_with(words: frozenset[str] | None, texts: Sequence[str]) -> str:
    """The first text with one of the words, or simply the first."""
    return next((text for text in texts if has_word(text, words)), texts[0])


def _read_words(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise OSError(f"word list {path}: cannot be read ({reason}); give a .txt file with one word a line") from error
    for number, line in enumerate(lines, 1):
        if line.strip() and not _WORD.fullmatch(line.strip().lower()):
            raise ValueError(f"word list {path}, line {number}: {line.strip()!r} would never be found; {_ONE_WORD}")
    if not any(line.strip() for line in lines):
        raise ValueError(f"word list {path}: has no word; give a .txt file with one word a line")
    return frozenset(line.strip().lower() for line in lines if line.strip())
