"""Turns pictures and texts into a model's inputs, through its own processor and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

IGNORED = -100
"""Label of positions at which nothing is learned."""


class PromptEncoder:
    """Encodes batches of one picture and one prompt each. Holds no weights, so loader processes can have it.

    Args:
        processor: The model's processor.
        image_token_id: Id of the token that stands for one visual token.
    """

    def __init__(self, processor: Any, image_token_id: int) -> None:
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
        bos = self.tokenizer.bos_token
        inputs = dict(
            self.processor(
                images=list(images),
                text=texts,
                padding=True,
                padding_side="left",
                return_tensors="pt",
                # Some chat templates write the beginning of sequence themselves, others leave it to the tokenizer.
                add_special_tokens=not (bos and texts[0].startswith(bos)),
            )
        )
        if targets is None:
            return inputs
        answers = [
            self._answer_ids(text, prompt, target) for text, prompt, target in zip(texts, prompts, targets, strict=True)
        ]
        return append_answers(inputs, answers, self.tokenizer.pad_token_id)

    def _render(self, prompt: str, answer: str | None = None) -> str:
        """The conversation as text: up to where the model answers, or with its whole answer."""
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt.strip()}]}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        if self.processor.chat_template is None:
            text = f"{self.tokenizer.convert_ids_to_tokens(self.image_token_id)}\n{prompt.strip()}"
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


def append_answers(inputs: dict[str, Tensor], answers: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Append token rows to prompts and pad on the right.

    Args:
        inputs: An encoded batch of B prompts; tensors of the shape of `input_ids` [B, T] are extended with 0.
        answers: B rows of token ids.
        pad_token_id: Fills the ends of shorter rows.

    Returns:
        The batch with `labels`.
    """
    mask = inputs["attention_mask"].bool()
    prompt_lengths = mask.sum(dim=1).tolist()
    width = max(length + len(answer) for length, answer in zip(prompt_lengths, answers, strict=True))
    shape = inputs["input_ids"].shape
    extended = dict(inputs)
    for name, value in inputs.items():
        if value.shape == shape:
            rows = value.new_full((shape[0], width), pad_token_id if name == "input_ids" else 0)
            for row, length in enumerate(prompt_lengths):
                rows[row, :length] = value[row, mask[row]]
            extended[name] = rows
    labels = torch.full_like(extended["input_ids"], IGNORED)
    for row, (length, answer) in enumerate(zip(prompt_lengths, answers, strict=True)):
        tokens = torch.tensor(answer, dtype=labels.dtype)
        span = slice(length, length + len(answer))
        extended["input_ids"][row, span] = tokens
        extended["attention_mask"][row, span] = 1
        labels[row, span] = tokens
    return {**extended, "labels": labels}


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
    shape = inputs["input_ids"].shape
    lengths = keep.sum(dim=1)
    width = int(lengths.max())
    # Stable sort by "kept" moves the kept positions to the right without changing their order.
    order = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)[:, -width:]
    filled = torch.arange(width, device=keep.device) >= (width - lengths)[:, None]
    trimmed = {}
    for name, value in inputs.items():
        if name == "labels":
            continue
        if value.shape == shape:
            fill = pad_token_id if name == "input_ids" else 0
            value = value.gather(1, order).masked_fill(~filled, fill)
        trimmed[name] = value
    return trimmed


def with_positions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add `position_ids` [B, T] that count from each row's first token, where rows are padded on the left.

    Without them a plain forward pass counts padding too; generation does this by itself.
    """
    mask = inputs["attention_mask"]
    if bool(mask[:, 0].all()):
        return inputs
    return {**inputs, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
