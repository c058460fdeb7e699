"""The token map: what stands at every position of every sample (METHODS §1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+")


class Role(IntEnum):
    """What a position holds."""

    PAD = 0
    SPECIAL = 1
    IMAGE = 2
    PROMPT = 3
    ANSWER = 4


@dataclass(frozen=True)
class Word:
    """A word of an answer, lower-cased, and the span of its sub-tokens (indices into the answer, both included)."""

    text: str
    first: int
    last: int


@dataclass
class TokenMap:
    """Positions of B samples in one batch of L columns.

    The state in column p predicts the token in column p + 1, so the states of an answer begin one column before
    the answer itself.

    Attributes:
        token_ids: Token ids [B, L].
        roles: `Role` of every position [B, L].
        answer_start: Column of each sample's first answer token [B].
        answers: Each sample's answer tokens, end of sequence included.
        words: Each sample's answer words.
    """

    token_ids: Tensor
    roles: Tensor
    answer_start: Tensor
    answers: list[list[int]]
    words: list[list[Word]]

    @property
    def first_column(self) -> Tensor:
        """Column of each sample's first position that is no padding [B]."""
        return (self.roles != Role.PAD).to(torch.uint8).argmax(dim=1)

    @property
    def image_index(self) -> Tensor:
        """Number of the visual token at each image position, −1 elsewhere [B, L]; indexes a `PatchGrid`."""
        is_image = self.roles == Role.IMAGE
        return torch.where(is_image, is_image.cumsum(dim=1) - 1, -1)

    def window(self, start: int, length: int) -> Tensor:
        """Roles [B, length] from column `start` on; columns past the map hold answers still being generated."""
        columns = self.roles[:, start : start + length]
        missing = length - columns.shape[1]
        if missing == 0:
            return columns
        return torch.cat([columns, columns.new_full((columns.shape[0], missing), Role.ANSWER)], dim=1)


def prompt_roles(
    token_ids: Tensor,
    attention_mask: Tensor,
    in_prompt: Tensor,
    image_token_id: int | None,
    special_ids: Sequence[int],
) -> Tensor:
    """Roles [B, L] of encoded prompts with one picture each, from ids, mask and where the prompt is [B, L].

    What stands between the first and the last visual token of a sample ends its rows or parts its tiles: it is special,
    and so is an image token that the model has written, where no visual token stands.
    """
    special = token_ids.new_tensor([*special_ids, *([] if image_token_id is None else [image_token_id])])
    roles = torch.full_like(token_ids, Role.PROMPT)
    roles[torch.isin(token_ids, special)] = Role.SPECIAL
    is_image = (token_ids == (-1 if image_token_id is None else image_token_id)) & in_prompt
    roles[is_image.cumsum(dim=1).bool() & is_image.flip(1).cumsum(dim=1).flip(1).bool()] = Role.SPECIAL
    roles[is_image] = Role.IMAGE
    roles[attention_mask == 0] = Role.PAD
    return roles


def answer_words(tokenizer: Any, answer: Sequence[int]) -> list[Word]:
    """Find the words of an answer and the sub-tokens of each.

    Spans come from decoding ever longer beginnings of the answer, so they hold for any tokenizer and for answers
    that it would itself have cut differently.
    """
    spans: list[tuple[int, int]] = []
    complete = 0
    text = ""
    for count in range(1, len(answer) + 1):
        text = tokenizer.decode(answer[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # The replacement character stands for one whose last byte is still to come.
        start, complete = complete, len(text.rstrip("\ufffd"))
        spans.append((start, complete + (complete < len(text))))
    words = []
    for match in _WORD.finditer(text):
        covering = [at for at, (start, end) in enumerate(spans) if end > match.start() and start < match.end()]
        if covering:
            words.append(Word(match.group().lower(), covering[0], covering[-1]))
    return words
