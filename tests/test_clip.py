"""CLIPScore against torchmetrics, and what must not change it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conceptshift.metrics import ClipEncoder, clip_score
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics.functional.multimodal import clip_score as reference_score
from transformers import AutoModel, AutoProcessor

TEXTS = ["a red star", "a photo of two blue squares on the left", "green", "a red star", "a small yellow circle."]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(40, 50), (32, 32), (64, 33), (100, 90), (35, 35)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


class _Unwrapped:
    """A CLIP model as torchmetrics knows it: its features are tensors, not outputs."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config

    def to(self, device: torch.device) -> _Unwrapped:
        return self

    def get_image_features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixels).pooler_output
        return features

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        features: Tensor = self.model.get_text_features(ids, mask).pooler_output
        return features


@torch.inference_mode()
def test_parity_with_torchmetrics(tiny_clip: Path, pictures: list[Image.Image]) -> None:
    encoder = ClipEncoder(str(tiny_clip))
    scores = clip_score(encoder.images(pictures), encoder.texts(TEXTS))
    model: Any = _Unwrapped(AutoModel.from_pretrained(tiny_clip).eval())
    processor: Any = AutoProcessor.from_pretrained(tiny_clip)
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]
    for score, tensor, text in zip(scores, tensors, TEXTS, strict=True):
        expected = reference_score(tensor, text, lambda: (model, processor))
        assert float(score) == pytest.approx(2.5 * float(expected.clamp(min=0)) / 100, abs=1e-5)
    assert scores.max() > 0
    assert scores.std() > 0.01, "a test of a model to which all is one would show nothing"


def test_batches_change_nothing(tiny_clip: Path, pictures: list[Image.Image]) -> None:
    whole = ClipEncoder(str(tiny_clip))
    single = ClipEncoder(str(tiny_clip), batch_size=2)
    read: list[int] = []

    def one_by_one() -> Iterator[Image.Image]:
        for index, picture in enumerate(pictures):
            read.append(index)
            yield picture

    torch.testing.assert_close(single.images(one_by_one()), whole.images(pictures), atol=1e-5, rtol=0)
    assert read == list(range(len(pictures)))
    torch.testing.assert_close(single.texts(TEXTS), whole.texts(TEXTS), atol=1e-5, rtol=0)
    torch.testing.assert_close(single.texts(TEXTS[::-1]), whole.texts(TEXTS).flip(0), atol=1e-5, rtol=0)


def test_embeddings_have_unit_length(tiny_clip: Path, pictures: list[Image.Image]) -> None:
    encoder = ClipEncoder(str(tiny_clip))
    for vectors in (encoder.images(pictures), encoder.texts(TEXTS)):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))


def test_long_texts_are_cut(tiny_clip: Path) -> None:
    encoder = ClipEncoder(str(tiny_clip))
    # 24 tokens, of which two mark beginning and end.
    long, cut = "star " * 200, "star " * 22
    assert torch.equal(encoder.texts([long]), encoder.texts([cut]))
    assert not torch.allclose(encoder.texts([long]), encoder.texts(["star " * 10]))


def test_score_is_never_negative() -> None:
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
    texts = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(clip_score(images, texts), torch.tensor([2.5, 0.0, 2.0]))
    torch.testing.assert_close(clip_score(images, texts, weight=1.0), torch.tensor([1.0, 0.0, 0.8]))


def test_what_does_not_pair_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`images` \[2, 3\] and `texts` \[1, 3\] must have the same shape"):
        clip_score(torch.ones(2, 3), torch.ones(1, 3))


def test_a_folder_that_is_no_clip(tiny: Path, tiny_bert: Path, tmp_path: Path) -> None:
    for folder, reason in ((tmp_path, ""), (tiny_bert, ""), (tiny, "it holds a LlavaModel"), (Path("/nowhere"), "")):
        with pytest.raises(ValueError, match="no CLIP model can be loaded from it") as caught:
            ClipEncoder(str(folder))
        assert f"clip_model '{folder}'" in str(caught.value)
        assert reason in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_weights_that_lack_are_not_made_up(tiny_clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "less"))
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"its files have no visual_projection\.weight, which would be random"):
        ClipEncoder(str(folder))
