"""Encoding: what the model reads, what it learns, and where padding goes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conceptshift.datamodules.sample import Encoder
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone.prompts import prompts_only, with_positions
from PIL import Image
from torch import Tensor

PROMPTS = ["Where is this?", "\nHow many shapes are there in the picture? ", "What?"]
TARGETS = ["on the beach", "2", "a red circle and a blue star"]
IMAGES = [Image.new("RGB", (64, 64), color) for color in ("red", "green", "blue")]


def rows(inputs: dict[str, Tensor]) -> list[list[int]]:
    """Token ids without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def test_prompts_end_where_the_model_answers(shared_backbone: VisionLanguageModel) -> None:
    model = shared_backbone
    inputs = model.encode(IMAGES, PROMPTS)
    assert "labels" not in inputs
    assert inputs["pixel_values"].shape == (3, 3, 64, 64)
    assert inputs["attention_mask"][:, -1].all(), "padding must be on the left"
    texts = [model.tokenizer.decode(row) for row in rows(inputs)]
    assert texts == [f"<s>USER: {'<image>' * 64}\n{prompt.strip()} ASSISTANT:" for prompt in PROMPTS]
    padding = inputs["input_ids"][inputs["attention_mask"] == 0]
    assert len(padding) > 0
    assert (padding == model.tokenizer.pad_token_id).all()


def test_answers_and_only_answers_are_labelled(shared_backbone: VisionLanguageModel) -> None:
    model = shared_backbone
    bare, inputs = model.encode(IMAGES, PROMPTS), model.encode(IMAGES, PROMPTS, TARGETS)
    assert inputs["attention_mask"][:, 0].all(), "padding must be on the right"
    for row, (prompt, target) in enumerate(zip(rows(bare), TARGETS, strict=True)):
        labels = inputs["labels"][row]
        answer = labels[labels != -100].tolist()
        assert model.tokenizer.decode(answer) == f" {target}</s>"
        assert rows(inputs)[row] == prompt + answer
        first = int((labels != -100).to(torch.uint8).argmax())
        assert first == len(prompt)
        assert (labels[first : first + len(answer)] != -100).all()
    assert torch.equal(inputs["pixel_values"], bare["pixel_values"])


def test_prompts_only_undoes_answers_and_padding(shared_backbone: VisionLanguageModel) -> None:
    model = shared_backbone
    pad = model.tokenizer.pad_token_id
    bare = model.encode(IMAGES, PROMPTS)
    for inputs in (bare, model.encode(IMAGES, PROMPTS, TARGETS), _wider(bare, pad)):
        stripped = prompts_only(inputs, pad)
        assert stripped.keys() == bare.keys()
        assert all(torch.equal(stripped[name], bare[name]) for name in bare)


def _wider(inputs: dict[str, Tensor], pad: int) -> dict[str, Tensor]:
    return {
        name: torch.nn.functional.pad(value, (3, 2), value=pad if name == "input_ids" else 0)
        if value.shape == inputs["input_ids"].shape
        else value
        for name, value in inputs.items()
    }


def test_positions_count_from_the_first_token(shared_backbone: VisionLanguageModel) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    model = shared_backbone.model
    positions = with_positions(model, {"input_ids": mask, "attention_mask": mask})["position_ids"]
    assert positions[0, 2:].tolist() == [0, 1, 2]
    assert positions[1].tolist() == [0, 1, 2, 3, 4]
    right = {"attention_mask": mask.flip(1)}
    assert with_positions(model, right) is right


class _Merging:
    """A tokenizer that merges the end of a prompt with the beginning of its answer."""

    bos_token, eos_token, pad_token_id = None, "!", 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {
            "input_ids": [1 if part == ": " else ord(part) for part in text.replace(": ", "\0").replace("\0", "\x01")]
        }


class _Processor:
    """As little of a processor as the encoder uses; its template closes turns with `!` and a line break."""

    chat_template = "…"
    tokenizer = _Merging()

    def apply_chat_template(
        self, turns: Sequence[dict[str, object]], add_generation_prompt: bool, tokenize: bool
    ) -> str:
        (text,) = [part["text"] for part in turns[0]["content"] if part["type"] == "text"]  # type: ignore[attr-defined]
        if add_generation_prompt:
            return f"{text}:"
        (answer,) = [part["text"] for part in turns[1]["content"]]  # type: ignore[attr-defined]
        return f"{text}: {answer}!\n"

    def __call__(self, images: object, text: Sequence[str], **options: object) -> dict[str, Tensor]:
        ids = [self.tokenizer(one, add_special_tokens=False)["input_ids"] for one in text]
        width = max(map(len, ids))
        return {
            "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
        }


def test_a_tokenizer_that_merges_over_the_border() -> None:
    """`x:` + ` y` would be one token `: `, which a model that answers after `x:` can never write."""
    from conceptshift.lightning_modules.backbone import PromptEncoder

    encode: Encoder = PromptEncoder(_Processor(), image_token_id=9)
    inputs = encode(IMAGES[:2], ["ab", "abcd"], ["yes", "n"])
    assert rows(inputs) == [[*map(ord, "ab: yes!\n")], [*map(ord, "abcd: n!\n")]]
    learned = [row[row != -100].tolist() for row in inputs["labels"]]
    assert learned == [[*map(ord, " yes!\n")], [*map(ord, " n!\n")]]


@pytest.mark.parametrize("prompt", ["{{ 1 + 1 }}", "<b>&amp;", "Ünïcode 日本?"])
def test_prompts_are_no_templates(shared_backbone: VisionLanguageModel, prompt: str) -> None:
    inputs = shared_backbone.encode(IMAGES[:1], [prompt])
    assert f"\n{prompt} ASSISTANT:" in shared_backbone.tokenizer.decode(inputs["input_ids"][0])


def test_a_prompt_that_names_the_image_token_is_refused(shared_backbone: VisionLanguageModel) -> None:
    with pytest.raises(ValueError, match="<image>"):
        shared_backbone.encode(IMAGES[:1], ["What is <image>?"])
