"""One language for positions, shared by extraction and steering (METHODS §1).

By role, known while a model runs: `all`, `prompt`, `last_prompt`, `image`, `text`, `answer` (states that predict the
answer's tokens: the last of the prompt and those after it), `generated` (without the last of the prompt), an index
(`0`) or a range (`3:7`) into the sequence without padding. By what was answered, known afterwards: an index or a bound
from the end (`-1`), `token_of_interest:dog`, `token_class:colors` (also `token_class:red,blue`, or
`token_class:words.txt`, a file with one word a line), `answer_mean`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ...datamodules.word_classes import word_class
from .token_map import Role, TokenMap

# Role → whether it holds for every position that comes after the prompt.
_ROLES = {
    "all": True,
    "prompt": False,
    "last_prompt": False,
    "image": False,
    "text": True,
    "answer": True,
    "generated": True,
}
_RANGE = re.compile(r"(-?\d+)?(:(-?\d+)?)?")


@dataclass(frozen=True)
class Selector:
    """A parsed selector; `name` is its text, which also labels the rows it selects."""

    name: str
    words: frozenset[str] = frozenset()
    bounds: tuple[int | None, int | None] | None = None

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Parse a selector.

        Raises:
            ValueError: It is none.
        """
        kind, _, argument = text.partition(":")
        if text in _ROLES or text == "answer_mean":
            return cls(text)
        if argument and any(len(word.split()) != 1 for word in argument.split(",")):
            raise ValueError(f"selector {text!r}: expected single words; answers are cut at spaces")
        if kind == "token_of_interest" and argument:
            return cls(text, words=frozenset({argument.lower()}))
        if kind == "token_class" and argument:
            return cls(text, words=word_class(argument if "," not in argument else argument.split(",")))
        if text and (match := _RANGE.fullmatch(text)):
            first = None if match[1] is None else int(match[1])
            if match[2] is None and first is not None:
                return cls(text, bounds=(first, first + 1 if first != -1 else None))
            return cls(text, bounds=(first, None if match[3] is None else int(match[3])))
        raise ValueError(
            f"selector {text!r}: expected one of {', '.join(_ROLES)}, answer_mean, token_of_interest:WORD, "
            "token_class:CLASS, an index or a range such as 3:7"
        )

    @property
    def needs_answer(self) -> bool:
        """Whether it can be applied only after the answer is known."""
        return bool(self.words) or self.name == "answer_mean" or self._counts_from_end

    @property
    def _counts_from_end(self) -> bool:
        return self.bounds is not None and any(bound is not None and bound < 0 for bound in self.bounds)

    @property
    def while_generating(self) -> bool | None:
        """Whether it selects each of the positions after the prompt; nothing where that depends on the sample."""
        return _ROLES.get(self.name)

    @property
    def leaves_prompt(self) -> bool:
        """Whether it selects nothing before the last position of the prompt, whatever the prompt."""
        return self.name in ("last_prompt", "answer", "generated")

    @property
    def is_mean(self) -> bool:
        """Whether the selected states are averaged into one."""
        return self.name == "answer_mean"

    def mask(self, token_map: TokenMap, start: int, length: int) -> Tensor:
        """Select by role among the columns that a module is working on.

        Args:
            token_map: Map of the batch, at least of its prompts.
            start: First column.
            length: Number of columns.

        Returns:
            Boolean mask [B, length]; padding is never selected.
        """
        roles = token_map.window(start, length)
        columns = torch.arange(start, start + length, device=roles.device)
        answer_start = token_map.answer_start[:, None]
        present = roles != Role.PAD
        if self.bounds is not None:
            return present & self._within(columns - token_map.first_column[:, None], token_map)
        match self.name:
            case "all":
                return present
            case "prompt":
                return present & (columns < answer_start)
            case "last_prompt":
                return present & (columns == answer_start - 1)
            case "image":
                return roles == Role.IMAGE
            case "text":
                return present & (roles != Role.IMAGE)
            case "answer":
                # The state in column p predicts the token in column p + 1.
                return present & (columns >= answer_start - 1)
            case "generated":
                return present & (columns >= answer_start)
        raise ValueError(f"selector {self.name!r} depends on the answer and cannot be applied while it is generated")

    def _within(self, indices: Tensor, token_map: TokenMap) -> Tensor:
        assert self.bounds is not None
        if self._counts_from_end and not any(token_map.answers):
            raise ValueError(f"selector {self.name!r} depends on the answer's end and cannot be applied before it")
        # Negative bounds count from the last state; the last token of the answer has none.
        answers = torch.tensor([len(answer) for answer in token_map.answers], device=indices.device)
        lengths = (token_map.answer_start - token_map.first_column + answers - 1)[:, None]
        first, last = self.bounds
        low = 0 if first is None else first
        selected = indices >= (low if low >= 0 else lengths + low)
        if last is not None:
            selected &= indices < (last if last >= 0 else lengths + last)
        return selected

    def columns(self, token_map: TokenMap, sample: int, states: int) -> list[int]:
        """Columns of the selected states of one sample, after its answer is known.

        Args:
            token_map: Map of the batch with answers.
            sample: Row of the batch.
            states: Number of columns that have a state.
        """
        start, answer = int(token_map.answer_start[sample]), token_map.answers[sample]
        if self.words:
            found = first_of(self.words, token_map, sample)
            return [] if found is None else [start + found - 1]
        if self.is_mean:
            # The end of sequence, where there is one, is the last token and no part of any word.
            count = len(answer) - int(token_map.roles[sample, start + len(answer) - 1] == Role.SPECIAL)
            return list(range(start - 1, start - 1 + count))
        selected = self.mask(token_map, 0, states)[sample].nonzero().flatten().tolist()
        return [column for column in selected if column < start + len(answer) - 1]


def first_of(words: Collection[str], token_map: TokenMap, sample: int) -> int | None:
    """Index of the last sub-token of the first answer word that is in `words`."""
    for word in token_map.words[sample]:
        if word.text in words:
            return word.last
    return None
