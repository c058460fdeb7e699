"""The token map: roles, and the words of an answer whatever its tokens are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone import Role, TokenMap
from conceptshift.lightning_modules.backbone.token_map import answer_words, prompt_roles


class Pieces:
    """A tokenizer whose tokens are given byte strings; `None` is a special token."""

    def __init__(self, *pieces: str | bytes | None) -> None:
        self.pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]

    def decode(self, tokens: Sequence[int], **options: bool) -> str:
        assert options == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return b"".join(self.pieces[token] or b"" for token in tokens).decode(errors="replace")


SNOWMAN = "☃é".encode()


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([" a", " dog", " runs"], [("a", 0, 0), ("dog", 1, 1), ("runs", 2, 2)]),
        (["a", " hot", "dog", "s", "."], [("a", 0, 0), ("hotdogs", 1, 3)]),
        (["D", "O", "G", None], [("dog", 0, 2)]),
        # Words that share a token, and tokens without any.
        (["red", "-or", "ange b", "us", " ", ","], [("red-orange", 0, 2), ("bus", 2, 3)]),
        (["don", "'", "t", " stop"], [("don't", 0, 2), ("stop", 3, 3)]),
        ([" 1", "2", " dogs", "3"], [("12", 0, 1), ("dogs", 2, 2), ("3", 3, 3)]),
        ([None, " a", None, " cat", None], [("a", 1, 1), ("cat", 3, 3)]),
        ([" tra", None, "in", None], [("train", 0, 2)]),
        (["", " ", "\n"], []),
        ([], []),
        # Characters whose bytes lie in several tokens: the word ends with the last of its bytes.
        ([" caf", b"\xc3", b"\xa9", " noir"], [("café", 0, 2), ("noir", 3, 3)]),
        ([b"\xe6", b"\x97", b"\xa5", b"\xe6\x9c", b"\xac", "!"], [("日本", 0, 4)]),
        ([" na", b"\xc3", b"\xafve"], [("naïve", 0, 2)]),
        (["a", b"\xc3", b"\xa9", "b"], [("aéb", 0, 3)]),
    ],
)
def test_words_and_their_tokens(pieces: list[str | bytes | None], words: list[tuple[str, int, int]]) -> None:
    found = answer_words(Pieces(*pieces), range(len(pieces)))
    assert [(word.text, word.first, word.last) for word in found] == words


@pytest.mark.parametrize(
    "text", ["a red circle and two blue stars", "Triangles, on the beach.", "über café", "日本 語"]
)
def test_words_of_a_real_tokenizer(shared_backbone: VisionLanguageModel, text: str) -> None:
    tokenizer = shared_backbone.tokenizer
    ids = tokenizer(f" {text}</s>", add_special_tokens=False)["input_ids"]
    words = answer_words(tokenizer, ids)
    assert [word.text for word in words] == text.replace(",", "").replace(".", "").lower().split()
    for word in words:
        assert word.text in tokenizer.decode(ids[word.first : word.last + 1]).lower()
        shorter = tokenizer.decode(ids[: word.last]).lower()
        assert not shorter.endswith(word.text), "the word is complete before its last token"


def test_roles() -> None:
    ids = torch.tensor([[0, 1, 9, 9, 5, 6], [1, 9, 9, 5, 0, 0]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    roles = prompt_roles(ids, mask, torch.ones_like(mask).bool(), image_token_id=9, special_ids=[0, 1])
    pad, special, image, prompt = Role.PAD, Role.SPECIAL, Role.IMAGE, Role.PROMPT
    assert roles.tolist() == [
        [pad, special, image, image, prompt, prompt],
        # A padding token that the mask keeps is a token like others.
        [special, image, image, prompt, special, pad],
    ]


def test_what_parts_rows_and_tiles_is_special() -> None:
    # Image tokens are 9; 7 ends a row and is a text token elsewhere; the last 9 is written by the model.
    ids = torch.tensor([[7, 9, 9, 7, 9, 9, 7, 5, 9, 5], [5, 9, 7, 9, 9, 7, 5, 5, 7, 5]])
    in_prompt = torch.arange(10) < torch.tensor([[8], [7]])
    roles = prompt_roles(ids, torch.ones_like(ids), in_prompt, image_token_id=9, special_ids=[])
    special, image, prompt = Role.SPECIAL, Role.IMAGE, Role.PROMPT
    assert roles.tolist() == [
        [prompt, image, image, special, image, image, prompt, prompt, special, prompt],
        [prompt, image, special, image, image, prompt, prompt, prompt, prompt, prompt],
    ]


def test_no_visual_tokens() -> None:
    ids = torch.tensor([[1, 9, 5]])
    roles = prompt_roles(ids, torch.ones_like(ids), torch.ones_like(ids).bool(), None, [1, 9])
    assert roles.tolist() == [[Role.SPECIAL, Role.SPECIAL, Role.PROMPT]]


def test_columns() -> None:
    roles = torch.tensor([[0, 0, 1, 3, 4], [1, 3, 4, 4, 0]])
    token_map = TokenMap(torch.zeros_like(roles), roles, torch.tensor([4, 2]), [[7], [7, 7]], [[], []])
    assert token_map.first_column.tolist() == [2, 0]
    assert token_map.window(1, 3).tolist() == [[0, 1, 3], [3, 4, 4]]
    assert token_map.window(4, 3).tolist() == [[4, 4, 4], [0, 4, 4]]
    assert token_map.window(6, 1).tolist() == [[4], [4]]


def test_special_tokens_in_an_answer_are_no_pictures(backbone: VisionLanguageModel) -> None:
    """A model may write the image token; no visual token stands there."""
    model = backbone
    with torch.no_grad():
        weight = model.unembed.weight
        assert isinstance(weight, torch.Tensor)
        weight[model.encode.image_token_id] = 10 * weight[model.tokenizer.eos_token_id]
        weight[model.tokenizer.eos_token_id] = 0
    from PIL import Image

    pictures = [Image.effect_noise((64, 64), 80).convert("RGB") for _ in range(6)]
    inputs = model.encode(pictures, ["Where is this?"] * 6)
    done = model.generate(inputs, 6, model.sites(["projector", "vision.block.0"]))
    written = [answer.count(model.encode.image_token_id or 0) for answer in done.token_map.answers]
    assert sum(written) > 0, "the test needs a model that writes it"
    assert (done.token_map.roles == Role.IMAGE).sum(dim=1).tolist() == [64] * 6
