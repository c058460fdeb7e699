"""`conceptshift architectures` finds the parts of the models of transformers, and says why where it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conceptshift.cli.architectures import Architecture, inspect
from conceptshift.cli.main import main
from conceptshift.lightning_modules.backbone.structure import Structure, Unembedding
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

PARTS = ("blocks", "norm", "unembedding", "image_token", "projector")


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the command writes, by model type."""
    path = tmp_path_factory.mktemp("architectures") / "list.json"
    assert main(["architectures", "--json", str(path)]) == 0
    return {one["model_type"]: one for one in json.loads(path.read_text())}


def test_all_are_listed_and_most_are_found(listed: dict[str, dict[str, Any]]) -> None:
    assert listed.keys() == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys()
    for one in listed.values():
        assert one.keys() == {"model_type", "supported", "reason", *PARTS}
    assert sum(one["supported"] for one in listed.values()) >= 80
    whole = [one for one in listed.values() if all(one[part] for part in PARTS)]
    assert len(whole) >= 75


def test_what_is_not_found_has_a_reason(listed: dict[str, dict[str, Any]]) -> None:
    for one in listed.values():
        assert one["supported"] or one["reason"]
        if not one["image_token"] and one["supported"]:
            assert "cross-attention" in one["reason"] or "encoder" in one["reason"]
    for beside in ("blip", "idefics", "mllama"):
        assert listed[beside]["reason"] == "pictures reach the language model through cross-attention"
    assert "timm" in listed["gemma3n"]["reason"]
    assert listed["pi0"] == {
        **dict.fromkeys(PARTS), "model_type": "pi0", "supported": False,
        "reason": "PI0Model has no list of blocks among layers, layer, block, blocks, h",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        (
            "llava",
            ["language_model.layers", "language_model.norm", "lm_head", "image_token_id", "multi_modal_projector"],
        ),
        ("qwen2_vl", ["language_model.layers", "language_model.norm", "lm_head", "image_token_id", "visual.merger"]),
        ("idefics2", ["text_model.layers", "text_model.norm", "lm_head", "image_token_id", "connector"]),
        (
            "lfm2_vl",
            ["language_model.layers", "language_model.embedding_norm", "lm_head", "image_token_id", "projector"],
        ),
        ("blip-2", ["decoder.layers", "decoder.final_layer_norm", "lm_head", "image_token_id", "language_projection"]),
        ("blip", ["bert.encoder.layer", "cls.predictions.transform", "cls.predictions.decoder", None, None]),
    ],
)
def test_parts(listed: dict[str, dict[str, Any]], model_type: str, expected: list[str | None]) -> None:
    for part, ending in zip(PARTS, expected, strict=True):
        found = listed[model_type][part]
        assert found is None if ending is None else found.endswith(ending), (part, found)


def test_a_model_that_cannot_be_made_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Any) -> None:
        raise RuntimeError("\n  out of parts \nand more")

    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_config", fail)
    expected = "its default configuration makes no model: out of parts"
    assert inspect("llava") == Architecture("llava", False, expected)


class _Odd(torch.nn.Module):
    """A language model with another name for its last norm."""

    def __init__(self, norm: str, last: Callable[[], torch.nn.Module]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2), last())])
        setattr(self, norm, torch.nn.LayerNorm(2))

    def get_decoder(self) -> torch.nn.Module:
        return self


def test_a_norm_of_another_name_is_not_taken_for_none() -> None:
    assert isinstance(Structure(_Odd("ln_f", torch.nn.GELU)).norm, torch.nn.LayerNorm)
    with pytest.raises(ValueError, match=r"_Odd has no final norm among norm, .*; it has layers, closing"):
        Structure(_Odd("closing", torch.nn.GELU)).norm  # noqa: B018
    # Blocks that end in a norm need none behind them.
    assert isinstance(Structure(_Odd("closing", lambda: torch.nn.LayerNorm(2))).norm, torch.nn.Identity)


def test_logits_are_scaled_as_configurations_say() -> None:
    head, states = torch.nn.Linear(3, 5), torch.randn(2, 3)
    logits = head(states)
    scaled = {
        "logit_scale": 4 * logits,
        "logits_scaling": logits / 4,
        "final_logit_softcapping": 4 * (logits / 4).tanh(),
    }
    for name, expected in scaled.items():
        torch.testing.assert_close(Unembedding(head, ((name, 4.0),))(states), expected)
