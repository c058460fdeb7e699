"""Word classes that captions are filtered by and positions are selected with."""

from __future__ import annotations

from collections.abc import Iterable

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


def word_class(words: str | Iterable[str]) -> frozenset[str]:
    """The words of a named class, or a list of words as it is, in lower case.

    Raises:
        ValueError: No class has that name, or the list is empty.
    """
    if isinstance(words, str):
        if words not in WORD_CLASSES:
            names = ", ".join(sorted(WORD_CLASSES))
            raise ValueError(f"no word class {words!r}; there are {names}, or give a list of words")
        return WORD_CLASSES[words]
    listed = frozenset(word.lower() for word in words)
    if not listed:
        raise ValueError("a word class needs at least one word, got an empty list")
    return listed
