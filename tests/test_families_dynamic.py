"""Each tiny model is what tests of the framework need: it runs, reads its picture and does not see padding."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.lightning_modules.backbone.processors import load_processor
from conceptshift.tests.families.dynamic import DYNAMIC, ODD
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, Gemma3Processor, Lfm2VlProcessor

PROMPTS = ("What is this?", "Describe the large red circle to the left of the square.")
PICTURES = ((112, 64), (48, 48))
# Processors that take a flat list of pictures for those of one sample.
NESTED = (Gemma3Processor, Lfm2VlProcessor)
# Families in which padding on the left changes what a model says, and why.
DISTURBED = {
    "blip": "positions count padding, and generation writes the beginning of sequence over the first padding token",
    "florence2": "positions of BART's encoder count padding: it is trained with padding on the right",
}
# Families that cannot be read back without torchvision, and why.
NOT_READ_BACK = {
    "mistral3": "transformers refuses its processor without torchvision",
    "molmo2": "its image processor is a stand-in",
    "lfm2_vl": "its image processor is a stand-in",
    "ernie4_5_vl_moe": "its processor cannot be saved without its part for videos",
}
ALL = {**DYNAMIC, **ODD}

built = lru_cache(maxsize=None)(lambda family: ALL[family]())


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture of coloured squares, of a width and height in pixels."""
    noise = torch.randint(256, (6, 6, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize(size, Image.Resampling.NEAREST)


def encode(processor: Any, rows: tuple[int, ...] = (0, 1), seed: int = 0) -> dict[str, Tensor]:
    """Encode some of two samples, padded on the left."""
    texts = [PROMPTS[row] for row in rows]
    if processor.chat_template:
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]} for text in texts]
        texts = [processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False) for turn in turns]
    images: list[Any] = [picture(PICTURES[row], row + seed) for row in rows]
    if isinstance(processor, NESTED):
        images = [[image] for image in images]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": False}
    return dict(processor(images=images, text=texts, **options))


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The logits [B, vocabulary] after each sample's last token."""
    with torch.no_grad():
        last: Tensor = model(**inputs).logits[:, -1]
    return last


def generated(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The logits [B, vocabulary] of the first token that a model writes."""
    options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    first: Tensor = model.generate(**inputs, **options).logits[0]
    return first


@pytest.mark.parametrize("family", DYNAMIC)
def test_visual_tokens_follow_the_size_of_the_picture(family: str) -> None:
    model, processor = built(family)
    assert model.config.model_type == family
    together = encode(processor)
    shown = (together["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
    alone = [encode(processor, rows=(row,))["input_ids"] for row in (0, 1)]
    assert shown == [int((ids == model.config.image_token_id).sum()) for ids in alone]
    assert shown[0] > shown[1] > 3


@pytest.mark.parametrize("family", DYNAMIC)
def test_padding_on_the_left_changes_nothing(family: str) -> None:
    model, processor = built(family)
    inputs = encode(processor)
    assert not inputs["attention_mask"].all()
    together = logits(model, inputs)
    alone = torch.cat([logits(model, encode(processor, rows=(row,))) for row in (0, 1)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", DYNAMIC)
def test_generation_begins_where_the_prompt_ends(family: str) -> None:
    model, processor = built(family)
    inputs = encode(processor)
    torch.testing.assert_close(generated(model, inputs), logits(model, inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [family for family in ODD if family not in DISTURBED])
def test_padding_on_the_left_changes_nothing_that_an_odd_model_writes(family: str) -> None:
    model, processor = built(family)
    alone = torch.cat([generated(model, encode(processor, rows=(row,))) for row in (0, 1)])
    torch.testing.assert_close(generated(model, encode(processor)), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ALL)
def test_the_picture_matters(family: str) -> None:
    model, processor = built(family)
    one, other = (generated(model, encode(processor, seed=seed)) for seed in (0, 7))
    assert (one - other).abs().amax(dim=1).min() > 1e-2


@pytest.mark.parametrize("family", [family for family in ALL if family not in NOT_READ_BACK])
def test_it_is_read_back_from_a_folder(family: str, tmp_path: Path) -> None:
    model, processor = built(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = encode(load_processor(str(tmp_path)))
    torch.testing.assert_close(generated(loaded, inputs), generated(model, encode(processor)), atol=1e-4, rtol=1e-4)
