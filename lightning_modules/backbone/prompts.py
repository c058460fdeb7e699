"""Turns pictures and texts into a model's inputs, through its own processor and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from PIL import Image
from torch import Tensor

IGNORED = -100
"""Label of positions at which nothing is learned."""


# Which tiles of the picture each position sees [B, T, pictures, tiles], where they are reached by cross-attention.
_SEEN = "cross_attention_mask"


class PromptEncoder:
    """Encodes batches of one picture and one prompt each. Holds no weights, so loader processes can have it.

    Args:
        processor: The model's processor.
        image_token_id: Id of the token that stands for one visual token; none where the model has no such token.
    """

    def __init__(self, processor: Any, image_token_id: int | None) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = image_token_id
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], targets: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Encode B samples.

        Args:
            images: B pictures.
            prompts: B prompts without chat template.
            targets: B answers to learn or to read states from; without them the batch is a bare prompt.

        Returns:
            `input_ids` and `attention_mask` [B, T] and the pictures' tensors. Without targets the rows are
            padded on the left, ready to generate. With targets they are padded on the right and `labels`
            [B, T] holds the answer's tokens, end of sequence included, and −100 elsewhere.
        """
        texts = [self._render(prompt) for prompt in prompts]
        # Some chat templates write the beginning of sequence themselves, others leave it to the tokenizer.
        bos = self.tokenizer.bos_token
        inputs = self._process(images, texts, add_special_tokens=not (bos and texts[0].startswith(bos)))
        inputs.pop("labels", None)  # of some processors, for texts that end in an answer
        # Processors that place the picture themselves may leave the padding behind it.
        inputs = prompts_only(inputs, self.tokenizer.pad_token_id)
        if targets is None:
            return inputs
        answers = [
            self._answer_ids(text, prompt, target) for text, prompt, target in zip(texts, prompts, targets, strict=True)
        ]
        return append_answers(inputs, answers, self.tokenizer.pad_token_id, self.image_token_id)

    def _process(self, images: Sequence[Image.Image], texts: Sequence[str], **options: Any) -> dict[str, Tensor]:
        # Some processors would cut long prompts, and with them visual tokens.
        padded = {"padding": True, "padding_side": "left", "truncation": False}
        given = {"text": list(texts), **padded, "return_tensors": "pt", **options}
        try:
            # Most processors take a list of pictures for each text, some no other form, and some one list for all.
            return dict(self.processor(images=[[image] for image in images], **given))
        except ValueError:
            return dict(self.processor(images=list(images), **given))

    @cached_property
    def _image_text(self) -> str:
        """What a prompt without chat template begins with; nothing where the processor places the picture itself."""
        if self.image_token_id is None:
            return ""
        try:
            ids = self._process([Image.new("RGB", (64, 64))], ["."])["input_ids"]
        except ValueError:  # it misses a place for the picture
            ids = torch.tensor([])
        return "" if (ids == self.image_token_id).any() else f"{self.tokenizer.decode([self.image_token_id])}\n"

    def _render(self, prompt: str, answer: str | None = None) -> str:
        """The conversation as text: up to where the model answers, or with its whole answer."""
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt.strip()}]}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        if self.processor.chat_template is None:
            text = f"{self._image_text}{prompt.strip()}"
            return text if answer is None else f"{text} {answer}{self.tokenizer.eos_token or ''}"
        rendered: str = self.processor.apply_chat_template(turns, add_generation_prompt=answer is None, tokenize=False)
        return rendered

    def _answer_ids(self, prompt_text: str, prompt: str, answer: str) -> list[int]:
        """The answer's tokens as they follow the prompt, with what the chat template closes a turn with."""
        whole = self._render(prompt, answer)
        if not whole.startswith(prompt_text):
            # Some templates put into a closed turn what is not in an open one (e.g. empty thoughts).
            whole = f"{prompt_text} {answer}{self.tokenizer.eos_token or ''}"
        prompt_ids = self.tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
        whole_ids: list[int] = self.tokenizer(whole, add_special_tokens=False)["input_ids"]
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            return whole_ids[len(prompt_ids) :]
        # The tokenizer merges across the border, which generation cannot do.
        alone: list[int] = self.tokenizer(whole[len(prompt_text) :], add_special_tokens=False)["input_ids"]
        return alone


def append_answers(
    inputs: dict[str, Tensor],
    answers: Sequence[Sequence[int]],
    pad_token_id: int,
    image_token_id: int | None = None,
) -> dict[str, Tensor]:
    """Append token rows to prompts and pad on the right.

    Args:
        inputs: An encoded batch of B prompts; tensors with a value for every position [B, T] go with it.
        answers: B rows of token ids.
        pad_token_id: Fills the ends of shorter rows.
        image_token_id: Id of the token that stands for one visual token.

    Returns:
        The batch with `labels`.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    prompt_lengths = mask.sum(dim=1).tolist()
    width = max(length + len(answer) for length, answer in zip(prompt_lengths, answers, strict=True))
    extended = dict(inputs)
    for name, value in inputs.items():
        if not by_position(name, value, ids.shape):
            continue
        fill = pad_token_id if name == "input_ids" else 0
        if name == "token_type_ids":
            # Tokens of the picture's type may see each other both ways; an answer is read forwards.
            fill = int(not value[ids == image_token_id].any())
        rows = value.new_full((len(ids), width, *value.shape[2:]), fill)
        for row, (length, answer) in enumerate(zip(prompt_lengths, answers, strict=True)):
            rows[row, :length] = value[row, mask[row]]
            if name == _SEEN:  # an answer sees of the picture what the end of its prompt sees
                rows[row, length : length + len(answer)] = rows[row, length - 1]
        extended[name] = rows
    labels = torch.full_like(extended["input_ids"], IGNORED)
    for row, (length, answer) in enumerate(zip(prompt_lengths, answers, strict=True)):
        tokens = torch.tensor(answer, dtype=labels.dtype)
        span = slice(length, length + len(answer))
        extended["input_ids"][row, span] = tokens
        extended["attention_mask"][row, span] = 1
        labels[row, span] = tokens
    return {**extended, "labels": labels}


def by_position(name: str, value: Tensor, shape: torch.Size) -> bool:
    """Whether a tensor of a batch has a value for every position of every sample [B, T]."""
    return value.shape == shape or (name == _SEEN and value.shape[:2] == shape)


def prompts_only(inputs: dict[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Drop answers and padding and pad on the left, as generation needs it.

    Args:
        inputs: An encoded batch with any padding; positions with a label are answers.
        pad_token_id: Fills the beginnings of shorter rows.

    Returns:
        The batch without `labels`; tensors of the shape of `input_ids` [B, T] become [B, longest prompt].
    """
    keep = inputs["attention_mask"].bool()
    if "labels" in inputs:
        keep = keep & (inputs["labels"] == IGNORED)
    lengths = keep.sum(dim=1)
    width = int(lengths.max())
    # Stable sort by "kept" moves the kept positions to the right without changing their order.
    order = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)[:, -width:]
    filled = torch.arange(width, device=keep.device) >= (width - lengths)[:, None]
    trimmed = {}
    for name, value in inputs.items():
        if name == "labels":
            continue
        if by_position(name, value, keep.shape):
            fill = pad_token_id if name == "input_ids" else 0
            beyond = (..., *[None] * (value.ndim - 2))
            value = value.gather(1, order[beyond].expand(-1, -1, *value.shape[2:])).masked_fill(~filled[beyond], fill)
        trimmed[name] = value
    return trimmed


def with_positions(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the positions that a model itself would generate with, where rows are padded on the left.

    Without them a plain forward pass counts padding too. Positions may have several parts (M-RoPE).

    Args:
        model: The transformers model.
        inputs: An encoded batch.
    """
    padded_before = (inputs["attention_mask"].diff(dim=1) > 0).any() or not inputs["attention_mask"][:, 0].all()
    if not padded_before or "position_ids" not in signature(model.forward).parameters:
        return inputs
    return {**inputs, "position_ids": model._prepare_position_ids_for_generation(inputs["input_ids"], inputs)}
