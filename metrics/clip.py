"""CLIPScore: how well a text fits a picture, as a CLIP model sees it (arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from ..records.paths import located
from .encoders import load_whole

_Item = TypeVar("_Item")


class ClipEncoder:
    """Embeds pictures and texts with a CLIP model (or one built alike, such as SigLIP). Remote code is never run.

    Args:
        model: Folder in the Hugging Face layout, or hub id.
        device: Where the model runs.
        batch_size: Pictures or texts at a time; changes no result.

    Raises:
        ValueError: `model` holds no CLIP model with its tokenizer and image processor.
    """

    def __init__(self, model: str, device: torch.device | str = "cpu", batch_size: int = 64) -> None:
        try:
            place = located(model, "folder", owned=False)
            # Pillow's resizing, so that a score does not depend on whether torchvision is installed.
            self._image_processor: Any = AutoImageProcessor.from_pretrained(place, backend="pil")
            self._tokenizer: Any = AutoTokenizer.from_pretrained(place)
            self._model: Any = load_whole(place).to(device).eval()
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise _no_clip(model, " ".join(str(error).split())) from error
        if not (hasattr(self._model, "get_image_features") and hasattr(self._model, "get_text_features")):
            raise _no_clip(model, f"it holds a {type(self._model).__name__}")
        self._device = device
        self._batch_size = batch_size
        self._length = min(self._model.config.text_config.max_position_embeddings, self._tokenizer.model_max_length)

    def images(self, pictures: Iterable[Image.Image]) -> Tensor:
        """Embed N pictures, at least one; an iterator is read batch by batch.

        Returns:
            Vectors of unit length [N, D], float32, on the CPU.
        """
        return self._embed(pictures, self._image_features)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed N texts, at least one, each cut to as many tokens as the model takes.

        Returns:
            Vectors of unit length [N, D], float32, on the CPU.
        """
        return self._embed(texts, self._text_features)

    @torch.inference_mode()
    def _embed(self, items: Iterable[_Item], features: Callable[[list[_Item]], Tensor]) -> Tensor:
        parts = [features(batch) for batch in _batches(items, self._batch_size)]
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    def _image_features(self, pictures: list[Image.Image]) -> Tensor:
        inputs = self._image_processor(images=pictures, return_tensors="pt").to(self._device)
        return _projected(self._model.get_image_features(**inputs))

    def _text_features(self, texts: list[str]) -> Tensor:
        # Always padded to the full length, as CLIP and SigLIP were trained.
        inputs = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        ).to(self._device)
        return _projected(self._model.get_text_features(**inputs))


def clip_score(images: Tensor, texts: Tensor, weight: float = 2.5) -> Tensor:
    """Return CLIPScore = weight · max(cos(picture, text), 0) of each pair.

    Args:
        images: Embedded pictures [N, D], of unit length, from `ClipEncoder.images`.
        texts: Embedded texts [N, D], of unit length, from `ClipEncoder.texts`.
        weight: 2.5 brings real pairs to about 0..1.

    Returns:
        Scores [N].

    Raises:
        ValueError: If the shapes differ.
    """
    if images.shape != texts.shape:
        raise ValueError(
            f"`images` {list(images.shape)} and `texts` {list(texts.shape)} must have the same shape: "
            "embed both with the same model and repeat what is paired several times"
        )
    return weight * (images * texts).sum(dim=-1).clamp(min=0)


def _projected(output: Any) -> Tensor:
    """What `get_*_features` returns: a tensor in the first releases of transformers 5, an output with it in later."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features.float().cpu()


def _batches(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _no_clip(model: str, reason: str) -> ValueError:
    return ValueError(
        f"clip_model {model!r}: no CLIP model can be loaded from it ({reason}); give a folder in the Hugging Face "
        "layout or a hub id, e.g. openai/clip-vit-base-patch32"
    )
