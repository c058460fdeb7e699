"""Pictures for Molmo: tiling, crops, masks, where their tokens go, and the texts around them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conceptshift.cli.shapes_model import shapes_corpus
from conceptshift.lightning_modules.backbone.molmo import MolmoImageProcessor, MolmoProcessor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from tests.molmo_reference import picture_positions
from tests.molmo_tiny import IMAGES, tiny_tokenizer

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Of the tiny processor: pixels from one crop to the next, and of both margins.
WINDOW, MARGIN, SIZE = 8, 16, 24


@pytest.fixture(scope="module")
def full() -> MolmoProcessor:
    """Pictures at the real sizes."""
    tokenizer = tiny_tokenizer(itertools.islice(shapes_corpus(), 200), 300)
    return MolmoProcessor(MolmoImageProcessor(), tokenizer)


@pytest.fixture(scope="module")
def small(full: Any) -> MolmoProcessor:
    """Pictures at small sizes, cut as the real ones."""
    return MolmoProcessor(MolmoImageProcessor(**{**IMAGES, "max_crops": 12}), full.tokenizer)


def noise(width: int, height: int) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def reference_tiling(height: int, width: int, window: int, margin: int, most: int) -> tuple[int, int]:
    tilings = sorted(
        ((i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most),
        key=lambda tiling: (tiling[0] * tiling[1], tiling[0]),
    )
    with np.errstate(divide="ignore"):
        scales = [
            min(
                float(np.float32(window * i) / np.float32(height - margin)),
                float(np.float32(window * j) / np.float32(width - margin)),
            )
            for i, j in tilings
        ]
    if all(scale < 1 for scale in scales):
        return tilings[scales.index(max(scales))]
    return tilings[scales.index(min(scale for scale in scales if scale >= 1))]


@pytest.mark.parametrize(
    ("height", "width", "tiling", "tokens"),
    [(480, 640, (2, 3), 740), (640, 480, (3, 2), 748), (336, 336, (1, 1), 316), (2800, 336, (12, 1), 1460)],
)
def test_known_sizes(full: Any, height: int, width: int, tiling: tuple[int, int], tokens: int) -> None:
    assert full.image_processor.tiling(width, height) == tiling
    encoded = full(images=[noise(width, height)], text="<|image|> User: What? Assistant:")
    text = full.tokenizer(" User: What? Assistant:")["input_ids"]
    assert len(encoded["input_ids"][0]) == 1 + tokens + len(text)
    assert encoded["input_ids"][0][1 + tokens :] == text
    assert encoded["pixel_values"].shape == (1, 1 + tiling[0] * tiling[1], 3, 336, 336)
    assert encoded["image_masks"].shape == (1, 1 + tiling[0] * tiling[1], 576)
    assert encoded["patch_numbers"].shape == (1, 1 + tiling[0] * tiling[1], 144)


SIZES = [*itertools.product((1, 111, 112, 113, 224, 335, 336, 400, 560, 777, 1200, 3000), repeat=2)]


def test_tilings_are_those_of_the_definition(full: Any) -> None:
    for height, width in SIZES:
        expected = reference_tiling(height, width, 224, 112, 12)
        assert full.image_processor.tiling(width, height) == expected, (height, width)
    assert full.image_processor.tiling(100, 90) == (1, 1)


@pytest.mark.parametrize(
    "tiling", [(i, j) for i in range(1, 13) for j in range(1, 13) if i * j in (1, 2, 3, 4, 6, 12)], ids=str
)
def test_positions_are_those_of_the_closed_form(full: Any, tiling: tuple[int, int]) -> None:
    width, height = (224 * tiles + 112 for tiles in reversed(tiling))
    assert full.image_processor.tiling(width, height) == tiling
    encoded = full(images=[Image.new("RGB", (width, height))], text="<|image|>", return_tensors="pt")
    positions = (encoded["input_ids"][0] == full.tokenizer.convert_tokens_to_ids("<im_patch>")).nonzero()[:, 0]
    numbers = encoded["patch_numbers"][0]
    placed = torch.where(numbers >= 0, positions[numbers.clamp(min=0)], -100)
    assert torch.equal(placed, picture_positions(tiling, 12, 2, 2))
    assert numbers[numbers >= 0].sort().values.tolist() == list(range(len(positions)))
    row_ends = encoded["input_ids"] == full.tokenizer.convert_tokens_to_ids("<im_col>")
    assert int(row_ends.sum()) == 12 + 8 * tiling[0] + 4


def test_small_pictures_are_cut_like_large_ones(small: Any) -> None:
    patch = small.tokenizer.convert_tokens_to_ids("<im_patch>")
    for height, width in itertools.product((7, 16, 17, 24, 33, 50, 71, 104), repeat=2):
        tiling = small.image_processor.tiling(width, height)
        assert tiling == reference_tiling(height, width, WINDOW, MARGIN, 12)
        encoded = small(images=[noise(width, height)], text="<|image|>", return_tensors="pt")
        positions = (encoded["input_ids"][0] == patch).nonzero()[:, 0]
        numbers = encoded["patch_numbers"][0]
        placed = torch.where(numbers >= 0, positions[numbers.clamp(min=0)], -100)
        assert torch.equal(placed, picture_positions(tiling, 3, 1, 1))


def fitted(image: Image.Image, height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The picture in a frame [height, width, 3] and where it is, resized by PIL, which filters as torch does."""
    scale = min(np.float32(height) / np.float32(image.height), np.float32(width) / np.float32(image.width))
    down, across = int(np.float32(image.height) * scale), int(np.float32(image.width) * scale)
    colors = [
        Image.fromarray(np.asarray(color, dtype=np.float32) / 255).resize((across, down), Image.Resampling.BILINEAR)
        for color in image.split()
    ]
    frame, inside = np.zeros((height, width, 3), np.float32), np.zeros((height, width), np.float32)
    top, left = (height - down) // 2, (width - across) // 2
    frame[top : top + down, left : left + across] = np.stack([np.asarray(color) for color in colors], axis=2)
    inside[top : top + down, left : left + across] = 1
    return frame, inside


def expected_crops(image: Image.Image, tiling: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Crops [C, 3, size, size] and the share of picture in their patches without any shift [C − 1, P]."""
    whole, _ = fitted(image, SIZE, SIZE)
    large, inside = fitted(image, WINDOW * tiling[0] + MARGIN, WINDOW * tiling[1] + MARGIN)
    crops, shares = [whole], []
    for a, b in itertools.product(range(tiling[0]), range(tiling[1])):
        y, x = WINDOW * a, WINDOW * b
        crops.append(large[y : y + SIZE, x : x + SIZE])
        shares.append(
            [inside[y + r : y + r + 4, x + c : x + c + 4].mean() for r in range(0, 24, 4) for c in range(0, 24, 4)]
        )
    pixels = (np.stack(crops) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(np.array(shares))


@pytest.mark.parametrize(("width", "height"), [(60, 41), (23, 57), (100, 30), (24, 24), (9, 14)])
def test_crops_and_masks_are_those_of_the_definition(small: Any, width: int, height: int) -> None:
    image = noise(width, height)
    processed = small.image_processor([image])
    crops, shares = expected_crops(image, small.image_processor.tiling(width, height))
    torch.testing.assert_close(processed["pixel_values"][0], crops, atol=2e-5, rtol=0)
    # The first crop, which is the whole picture, has the second's mask, and so on; the last has none.
    torch.testing.assert_close(processed["image_masks"][0], torch.cat([shares, torch.full((1, 36), -1.0)]))
    assert 0 < shares.mean() <= 1


def test_sizes_are_cut_off_not_rounded(small: Any) -> None:
    for height in (3, 4, 5, 10):
        whole = small.image_processor([Image.new("RGB", (25, height), "white")])["pixel_values"][0, 0]
        lit = int((whole[0, :, 12] > 0).sum())
        assert lit == height - 1  # 24 / 25 of it, which is nearer to all of it


def test_pictures_of_any_kind_and_shape(small: Any) -> None:
    color = noise(30, 20)
    for mode in ("L", "P", "RGBA", "1"):
        other = color.convert(mode)
        given = small.image_processor([other])["pixel_values"]
        assert torch.equal(given, small.image_processor([other.convert("RGB")])["pixel_values"])
    line = small.image_processor([Image.new("RGB", (2000, 3), "white")])["pixel_values"][0]
    assert (line[0] > 1).any(), "of a narrow picture a line is left"


def test_fewer_crops_are_filled_up(small: Any) -> None:
    images = [noise(100, 30), noise(20, 20)]
    together = small.image_processor(images)
    alone = small.image_processor(images[1:])
    crops = alone["pixel_values"].shape[1]
    assert crops < together["pixel_values"].shape[1]
    for name, value in together.items():
        assert torch.equal(value[1, :crops], alone[name][0])
        assert (value[1, crops:] == -1).all()


def test_published_files_are_read(tmp_path: Path) -> None:
    published = {
        "base_image_input_size": [336, 336],
        "do_normalize": True,
        "image_mean": MEAN,
        "image_padding_mask": True,
        "image_patch_size": 14,
        "image_processor_type": "MolmoImageProcessor",
        "image_std": STD,
        "image_token_length_h": 12,
        "image_token_length_w": 12,
        "max_crops": 12,
        "overlap_margins": [4, 4],
        "processor_class": "MolmoProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    loaded = MolmoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded([noise(50, 40)])["pixel_values"], MolmoImageProcessor()([noise(50, 40)])["pixel_values"])


def test_processor_is_written_and_read(small: Any, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    loaded: Any = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MolmoProcessor
    assert loaded.chat_template == small.chat_template
    text = small.apply_chat_template(conversation("Where?"), add_generation_prompt=True)
    inputs: dict[str, Any] = {"images": [noise(70, 40)], "text": [text], "return_tensors": "pt"}
    for name, value in loaded(**inputs).items():
        assert torch.equal(value, small(**inputs)[name]), name


def conversation(question: str, *answers: str) -> list[dict[str, object]]:
    turns: list[dict[str, object]] = [
        {"role": "user", "content": [{"type": "text", "text": question}, {"type": "image"}]},
    ]
    for answer in answers:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        turns.append({"role": "user", "content": [{"type": "text", "text": "More?"}]})
    return turns


def test_chat_template(small: Any) -> None:
    end = "<|endoftext|>"
    prompt = small.apply_chat_template(conversation("Where?"), add_generation_prompt=True)
    assert prompt == f"{end}<|image|> User: Where? Assistant:"
    closed = small.apply_chat_template(conversation("Where?", "There.")[:2])
    assert closed == f"{prompt} There.{end}"
    again = small.apply_chat_template(conversation("Where?", "There."), add_generation_prompt=True)
    assert again == f"{prompt} There.{end} User: More? Assistant:"


def test_texts_begin_once(small: Any) -> None:
    begin = small.tokenizer.eos_token_id
    plain = small.tokenizer(" User: Hi Assistant:")["input_ids"]
    assert small(text=" User: Hi Assistant:")["input_ids"] == [[begin, *plain]]
    assert small(text="<|endoftext|> User: Hi Assistant:")["input_ids"] == [[begin, *plain]]
    assert small(text=" User: Hi Assistant:", add_special_tokens=False)["input_ids"] == [plain]
    assert "pixel_values" not in small(text="Hi")


def test_padding_is_not_told_by_its_token(small: Any) -> None:
    texts = ["<|endoftext|><|image|> User: What is it? Assistant:", "<|endoftext|> User: Hi Assistant:"]
    for side in ("left", "right"):
        encoded = small(images=[noise(30, 40)], text=texts, padding=True, padding_side=side, return_tensors="pt")
        assert small.tokenizer.pad_token_id == small.tokenizer.eos_token_id
        lengths = [
            len(small(images=[noise(30, 40)], text=texts[:1])["input_ids"][0]),
            len(small(text=texts[1])["input_ids"][0]),
        ]
        assert encoded["attention_mask"].sum(dim=1).tolist() == lengths
        first = encoded["attention_mask"][1].argmax()
        assert encoded["input_ids"][1, first] == small.tokenizer.eos_token_id
        # The text without a picture has none of the batch's crops.
        assert (encoded["pixel_values"][1] == -1).all()
        assert (encoded["patch_numbers"][1] == -1).all()


def test_tokenizing_chat_template(small: Any) -> None:
    image = noise(30, 40)
    turns = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Where?"}]}]
    given = small.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    text = small.apply_chat_template(turns, add_generation_prompt=True)
    assert torch.equal(given["input_ids"], small(images=[image], text=text, return_tensors="pt")["input_ids"])
    assert "pixel_values" in given


def test_errors(small: Any) -> None:
    with pytest.raises(ValueError, match=r"a text has 2 `<\|image\|>`; Molmo takes one picture"):
        small(images=[noise(9, 9)] * 2, text="<|image|><|image|> User: Which?")
    with pytest.raises(ValueError, match=r"1 pictures for 0 `<\|image\|>` in 1 texts"):
        small(images=[noise(9, 9)], text=" User: Which?")
    with pytest.raises(ValueError, match="max_length: not known"):
        small(text="a", max_length=4)
