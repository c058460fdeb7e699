"""Penn-Treebank tokens of captions, as the caption scores define them, without Java.

The caption scores are defined on the output of Stanford's PTBTokenizer (CoreNLP 3.4.1, `-preserveLines
-lowerCase`) after the punctuation list of coco-caption has been removed. `ptb_tokenize` yields the same
strings in Python; `java_tokenize` runs the original.
"""

import re
import shutil
from collections.abc import Sequence
from functools import lru_cache

from .ptb_rules import MARKS, QUOTES, RULES, SYMBOLS

_ASSIMILATED = {
    "cannot": "can not",
    "gimme": "gim me",
    "gonna": "gon na",
    "gotta": "got ta",
    "lemme": "lem me",
    "wanna": "wan na",
}
# The punctuation list says "-LRB-", but the tokens are lower-cased before it is applied: brackets stay.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_RESPELLED = _BRACKETS | {
    **dict.fromkeys("\u0080\u00a4\u20a0\u20ac", "$"),
    "\u00a2": "cents",
    "\u00a3": "#",
    "\u00bc": "1/4",
    "\u00bd": "1/2",
    "\u00be": "3/4",
    "\u2153": "1/3",
    "\u2154": "2/3",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
}
# These two vanish only as they are written here; "&QUOT;" comes back.
_ENTITIES = re.compile(r"&(?:apos|quot|(?i:nbsp|mdash));")
# Full stops, commas, dashes and quotes never come back. Longer runs of ?, ! and of five dashes do: the
# punctuation list does not name them.
_DROPPED = re.compile(rf"[.,:!?;'\"{QUOTES}\u0085\u0096\u0097\u00ad\u2013-\u2015\u2026]|-{{1,4}}|\.[. \u00a0]+|''|``")
_QUOTE_PAIR = re.compile(f"[{QUOTES}]{{2}}")
_QUOTES_AS_ASCII = str.maketrans(
    {
        **dict.fromkeys("\u0092\u2019\u203a", "'"),
        **dict.fromkeys("\u0091\u2018\u201b\u2039", "`"),
        **dict.fromkeys("\u0093\u201c\u00ab", "``"),
        **dict.fromkeys("\u0094\u201d\u00bb", "''"),
    }
)
_CUT_OFF = re.compile(r"(?:n[^a-z]t|[^a-z](?:[msd]|re|ve|ll))")
_SYMBOL = re.compile(f"[{SYMBOLS}{MARKS}]")
_LINE_BREAKS = re.compile(r"[\n\r\u000b\u000c\u2028\u2029]")
# Most of a caption is plain words between spaces; none of the rules reaches further for those.
_PLAIN_WORD = re.compile(r"[A-Za-z]+(?=[ \n])")


def ptb_tokenize(captions: Sequence[str]) -> list[str]:
    """Tokenize captions as pycocoevalcap's `PTBTokenizer` does, each on its own and without Java.

    A line break inside a caption counts as a space. What the original does to brackets (kept, as "-lrb-")
    and to "!!" (kept) is done here too: the scores are defined by it.

    Known to differ from the original:
        * The original reads all captions as one text, so the first word of the next caption can decide
          whether "no." or "a." keeps its period, and the last one of all is read without a line end. Here
          a caption never depends on its neighbours; it is read as one followed by an empty line.
        * Carriage returns, form feeds and the rare line breaks of Unicode count as spaces here; in the
          original they shift every later caption against its id (`java_tokenize` prevents that).
        * Letters and symbols that entered Unicode after 2010 and a few rare scripts; entities other than
          &amp; &lt; &gt; &quot; &apos; &nbsp; &mdash;; malformed mark-up and addresses.

    Args:
        captions: The captions, with their original capitals: some abbreviations depend on them.

    Returns:
        For each caption its tokens, lower-case, joined by spaces; punctuation removed.
    """
    return [_tokenized(caption) for caption in captions]


def java_tokenize(captions: Sequence[str]) -> list[str]:
    """Tokenize captions with the original PTBTokenizer, which pycocoevalcap runs in Java.

    Args:
        captions: The captions.

    Returns:
        For each caption its tokens, lower-case, joined by spaces; punctuation removed.

    Raises:
        ValueError: If there is no `java` on the PATH, or the tokenizer returned another number of lines.
    """
    if shutil.which("java") is None:
        raise ValueError(
            "tokenizer 'java' needs `java` on the PATH and found none: install it (Debian: default-jre-headless) or "
            "use 'python'"
        )
    if not captions:
        return []
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The wrapper replaces line feeds only; any other line break would shift all later captions by one.
    on_one_line = [{"caption": _LINE_BREAKS.sub(" ", caption)} for caption in captions]
    lines = PTBTokenizer().tokenize({0: on_one_line}).get(0, [])
    if len(lines) != len(captions):
        raise ValueError(
            f"tokenizer 'java' returned {len(lines)} lines for {len(captions)} captions: run `java -version` to see "
            "whether the JRE works, or use 'python'"
        )
    return [str(line) for line in lines]


# The references of a set come again with every run that is scored on it.
@lru_cache(maxsize=2**17)
def _tokenized(caption: str) -> str:
    return " ".join(_tokens(caption))


def _tokens(caption: str) -> list[str]:
    """Return the tokens of one caption, punctuation removed."""
    # Some rules look two characters ahead, so the text ends on two line breaks.
    text = _LINE_BREAKS.sub(" ", caption) + "\n\n"
    tokens: list[str] = []
    position = 0
    while position < len(text):
        if text[position] in " \t\n":
            position += 1
            continue
        plain = _PLAIN_WORD.match(text, position)
        if plain:
            word = plain[0].lower()
            tokens.append(_ASSIMILATED.get(word, word))
            position = plain.end()
            continue
        body, looked_ahead = _longest(text, position)
        position += len(body)
        token = _spell(body, looked_ahead)
        if token:
            tokens.append(token)
    return tokens


def _longest(text: str, position: int) -> tuple[str, bool]:
    """Return the token at the position by the furthest-reaching rule, and whether that looked ahead."""
    end, body_end = position, position + 1
    for rule in RULES:
        match = rule.match(text, position)
        if match and match.end() > end and match.end(1) > position:
            end, body_end = match.end(), match.end(1)
    return text[position:body_end], end > body_end


def _spell(body: str, looked_ahead: bool) -> str:
    """Return the token as the tokenizer prints it, or nothing for punctuation and unknown characters."""
    if _DROPPED.fullmatch(body) or _ENTITIES.fullmatch(body):
        return ""
    if _QUOTE_PAIR.fullmatch(body):
        pair = body.translate(_QUOTES_AS_ASCII)
        return "" if _DROPPED.fullmatch(pair) else pair
    if body.lower() in _RESPELLED:
        return _RESPELLED[body.lower()]
    if len(body) == 1 and not body.isalnum():
        return body if _SYMBOL.match(body) else ""
    token = body.lower()
    if token in _ASSIMILATED and not looked_ahead:
        return _ASSIMILATED[token]
    if "://" not in token and "@" not in token:
        token = token.replace("&amp;", "&")
    cut_off = body.replace("&apos;", "'").lower()
    if _CUT_OFF.fullmatch(cut_off):
        token = cut_off.translate(_QUOTES_AS_ASCII)
    token = token.replace("(", "-lrb-").replace(")", "-rrb-")
    return token.replace("\u00ad", "").replace(" ", "\u00a0")
