"""How Molmo reads a conversation: what begins a text, the picture laid out in tokens, then the turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images

_PICTURE = "<|image|>"

# The token that ends a text begins it, too. Pictures come before all turns, wherever they stand in them.
_CHAT_TEMPLATE = (
    "{{ eos_token }}"
    "{% for message in messages %}"
    "{% for part in message['content'] if part['type'] == 'image' %}" + _PICTURE + "{% endfor %}{% endfor %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %} User: {% else %} Assistant: {% endif %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] != 'user' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} Assistant:{% endif %}"
)


class MolmoProcessor(ProcessorMixin):
    """Encodes pictures and texts together, at most one picture a text.

    Args:
        image_processor: For the pictures.
        tokenizer: For the texts.
        chat_template: Instead of Molmo's own, if it places pictures.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        # The published tokenizer has a template of the language model that Molmo was made from, and transformers takes
        # a tokenizer's for the processor's where a folder was written anew.
        if chat_template is None or _PICTURE not in chat_template:
            chat_template = _CHAT_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = False,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encode B texts.

        Args:
            images: The pictures, as many as there are `<|image|>` in the texts.
            text: Texts as the chat template writes them, with `<|image|>` where the picture is.
            padding: As of a tokenizer.
            padding_side: As of a tokenizer.
            add_special_tokens: Begin texts with what begins a text, if they do not yet.
            return_tensors: As of a tokenizer. What is made of the pictures is tensors in any case.
            **kwargs: Nothing that asks for anything; other processors take more.

        Returns:
            `input_ids` and `attention_mask` [B, T]; with pictures what the image processor gives, in which texts
            without a picture have −1 only.

        Raises:
            ValueError: A text has several pictures, their number is not that of the `<|image|>`, or an argument is
                not known.
        """
        unknown = sorted(name for name, value in kwargs.items() if value not in (None, False))
        if unknown:
            raise ValueError(f"{unknown[0]}: not known to Molmo's processor; leave it out")
        texts = [text] if isinstance(text, str) else list(text or ())
        pictures: Any = [] if images is None else make_flat_list_of_images(images)
        counts = [one.count(_PICTURE) for one in texts]
        if max(counts, default=0) > 1:
            raise ValueError(f"a text has {max(counts)} `{_PICTURE}`; Molmo takes one picture a text")
        if sum(counts) != len(pictures):
            raise ValueError(
                f"{len(pictures)} pictures for {sum(counts)} `{_PICTURE}` in {len(texts)} texts; write one into the "
                "text of each picture, as the chat template does"
            )
        remaining = iter(pictures)
        rows = [
            self._ids(one, next(remaining) if count else None, add_special_tokens)
            for one, count in zip(texts, counts, strict=True)
        ]
        encoded = self.tokenizer.pad(
            {"input_ids": rows}, padding=padding, padding_side=padding_side, return_tensors=return_tensors
        )
        seen = self.image_processor(pictures) if pictures else {}
        spread = {name: _spread(value, torch.tensor(counts, dtype=torch.bool)) for name, value in seen.items()}
        return BatchFeature({**encoded, **spread})

    def _ids(self, text: str, picture: Image.Image | None, begin: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if picture is not None:
            at = ids.index(self.tokenizer.convert_tokens_to_ids(_PICTURE))
            ids[at : at + 1] = self.tokenizer.convert_tokens_to_ids(self._layout(picture))
        first = self.tokenizer.eos_token_id
        return ids if not begin or ids[:1] == [first] else [first, *ids]

    def _layout(self, picture: Image.Image) -> list[str]:
        """The tokens of a picture: the whole of it, then its crops put together, each row ended by `<im_col>`."""
        side = self.image_processor.tokens_per_side
        crops = self.image_processor.token_grid(self.image_processor.tiling(picture.width, picture.height))
        return [
            token
            for rows, columns in ((side, side), crops)
            for token in ("<im_start>", *(["<im_patch>"] * columns + ["<im_col>"]) * rows, "<im_end>")
        ]


def _spread(value: Tensor, has_picture: Tensor) -> Tensor:
    """A row for each text [B, …] from one for each picture, −1 where there is none."""
    rows = value.new_full((len(has_picture), *value.shape[1:]), -1)
    rows[has_picture] = value
    return rows
