"""Whole models as destinations: each is what it is when it is loaded alone, settings and generation included."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.lightning_modules import VisionLanguageModel
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

Changed = Callable[..., Path]


@pytest.fixture
def changed(tiny: Path, tmp_path: Path) -> Changed:
    """A copy of the tiny model with other entries in one of its files: `changed("config.json", key=value)`."""

    def make(file: str = "config.json", **entries: Any) -> Path:
        folder = tmp_path / "changed"
        if not folder.exists():
            shutil.copytree(tiny, folder)
        content = json.loads((folder / file).read_text())
        for key, value in entries.items():
            content[key] = {**content[key], **value} if isinstance(content.get(key), dict) else value
        (folder / file).write_text(json.dumps(content))
        return folder

    return make


@pytest.fixture(scope="module")
def inputs(shared_backbone: VisionLanguageModel, pictures: list[Image.Image]) -> dict[str, Tensor]:
    return {**shared_backbone.encode(pictures[:2], ["What is it?", "Where?"])}


def plain(folder: Path) -> Any:
    """The model as transformers alone loads it."""
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


def answers(model: Any, inputs: dict[str, Tensor], pad: int) -> list[list[int]]:
    found = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=pad)
    rows: list[list[int]] = found[:, inputs["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return [row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))] for row in rows]


_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

SETTINGS: dict[str, dict[str, Any]] = {
    "layer of the vision tower": {"vision_feature_layer": -2},
    "several layers": {"vision_feature_layer": -3},
    "rope": {"text_config": {"rope_parameters": _ROPE}},
    "base of rope": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}},
    "activation": {"text_config": {"hidden_act": "gelu"}},
    "norm": {"text_config": {"rms_norm_eps": 0.5}},
    "activation of the vision tower": {"vision_config": {"hidden_act": "relu"}},
    "norm of the vision tower": {"vision_config": {"layer_norm_eps": 0.5}},
    "activation of the projector": {"projector_hidden_act": "relu"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_exchanged(name: str, changed: Changed, tiny: Path, inputs: dict[str, Tensor]) -> None:
    folder = changed(**SETTINGS[name])
    own, theirs = logits(plain(tiny), inputs), logits(plain(folder), inputs)
    assert not torch.equal(own, theirs)
    model = VisionLanguageModel.load(str(tiny))
    model.add_destination(str(folder))
    for _ in range(2):
        assert torch.equal(logits(model.model, inputs), own)
        with model.running_as("destination"):
            assert torch.equal(logits(model.model, inputs), theirs)


ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 16, "long_factor": [4.0] * 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("which", ["destination", "original"])
def test_positions_that_depend_on_the_length(
    rope: str, which: str, changed: Changed, tiny: Path, inputs: dict[str, Tensor]
) -> None:
    """Such models exchange their own buffers in a pass: each has its own, in any order of calls."""
    folder = changed(text_config={"rope_parameters": ROPES[rope], "max_position_embeddings": 8})
    first, second = (tiny, folder) if which == "destination" else (folder, tiny)
    expected = {"original": logits(plain(first), inputs), "destination": logits(plain(second), inputs)}
    assert not torch.equal(*expected.values())
    model = VisionLanguageModel.load(str(first))
    if which == "original":
        assert torch.equal(logits(model.model, inputs), expected["original"])
    model.add_destination(str(second))
    for name in ("original", "destination", "destination", "original", "original", "destination", "original"):
        with model.running_as(name):
            assert torch.equal(logits(model.model, inputs), expected[name]), name


def test_what_cannot_be_generated_is_told_at_once(changed: Changed, tiny: Path) -> None:
    folder = changed("generation_config.json", stop_strings=["."])
    with pytest.raises(ValueError, match=r"it cannot answer as the original is asked .*tokenizer"):
        VisionLanguageModel.load(str(tiny)).add_destination(str(folder))


def test_a_configuration_that_cannot_be_is_told_in_a_line(changed: Changed, tiny: Path) -> None:
    folder = changed(text_config={"num_attention_heads": 5})
    with pytest.raises(ValueError, match="give a model that was fine-tuned from") as error:
        VisionLanguageModel.load(str(tiny)).add_destination(str(folder))
    assert "\n" not in str(error.value)


def test_settings_beside_adapters(
    changed: Changed, tiny: Path, inputs: dict[str, Tensor], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """In both orders: an adapter wraps modules whose settings are exchanged."""
    folder = changed(**SETTINGS["activation"], vision_feature_layer=-2)
    adapter = make_adapter(tiny, tmp_path / "adapter", scale=0.3)
    with_adapter = VisionLanguageModel.load(str(tiny), adapter=str(adapter))
    expected = {
        "original": logits(plain(tiny), inputs),
        "adapter": logits(with_adapter.model, inputs),
        "whole": logits(plain(folder), inputs),
    }
    for order in (("adapter", "whole"), ("whole", "adapter")):
        model = VisionLanguageModel.load(str(tiny))
        for name in order:
            model.add_destination(str({"adapter": adapter, "whole": folder}[name]), name)
        for name in ("whole", "original", "adapter", "whole", "adapter", "original"):
            with model.running_as(name):
                assert torch.equal(logits(model.model, inputs), expected[name]), (order, name)


@pytest.mark.parametrize("entries", [{"eos_token_id": [2, 372]}, {"eos_token_id": 5}, {"repetition_penalty": 5.0}])
def test_it_generates_as_it_is_told_to(
    entries: dict[str, Any], changed: Changed, tiny: Path, inputs: dict[str, Tensor]
) -> None:
    """Other end tokens give answers of another length, with the same weights."""
    alone = plain(tiny)
    if entries.get("eos_token_id") == 5:
        # The first token of an answer: it ends at once.
        entries = {"eos_token_id": answers(alone, inputs, 0)[0][0]}
    folder = changed("generation_config.json", **entries)
    model = VisionLanguageModel.load(str(tiny))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # logits are the same
        model.add_destination(str(folder))
    pad = model.tokenizer.pad_token_id
    expected = {"original": answers(alone, inputs, pad), "destination": answers(plain(folder), inputs, pad)}
    assert expected["original"] != expected["destination"]
    for name in ("destination", "original", "destination"):
        with model.running_as(name):
            found = model.generate(inputs, 12)
        assert found.token_map.answers == expected[name], name


def test_a_merged_model_without_a_processor(changed: Changed, tiny: Path, inputs: dict[str, Tensor]) -> None:
    folder = changed(vision_feature_layer=-2)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    model = VisionLanguageModel.load(str(tiny))
    model.add_destination(str(folder))
    with model.running_as("destination"):
        assert torch.equal(logits(model.model, inputs), logits(plain(folder), inputs))


def grow(tiny: Path, folder: Path, tokens: int = 5, *, processor: bool) -> Path:
    """The tiny model with more tokens, whose rows are not those of others."""
    model, tokenizer = plain(tiny), AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens([f"<new{number}>" for number in range(tokens)])
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[-1] *= 50
    model.save_pretrained(folder)
    if processor:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("processor", [True, False])
def test_a_grown_vocabulary(processor: bool, tiny: Path, tmp_path: Path, inputs: dict[str, Tensor]) -> None:
    folder = grow(tiny, tmp_path / "grown", processor=processor)
    model = VisionLanguageModel.load(str(tiny))
    own = logits(model.model, inputs)
    model.add_destination(str(folder))
    with model.running_as("destination"):
        assert torch.equal(logits(model.model, inputs), logits(plain(folder), inputs))
        assert len(model.vocabulary) == own.shape[-1] + 5
        assert model.vocabulary[-1] == ("<new4>" if processor else "")
        said = model.generate(inputs, 3)
        assert own.shape[-1] + 4 in said.token_map.answers[0]
        assert ("<new4>" in said.texts[0]) == processor
        model.self_check()
    assert torch.equal(logits(model.model, inputs), own)
    assert len(model.vocabulary) == own.shape[-1]
    assert model.vocabulary == VisionLanguageModel.load(str(tiny)).vocabulary


def test_what_reads_other_pictures_or_words_is_refused(changed: Changed, tiny: Path, tmp_path: Path) -> None:
    model = VisionLanguageModel.load(str(tiny))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folder = changed("processor_config.json", image_processor={"image_mean": [0.5, 0.5, 0.5]})
    with pytest.raises(
        ValueError, match=r"reads pictures with image_mean \(0\.5, 0\.5, 0\.5\), the original with \(0\.48"
    ):
        model.add_destination(str(folder))
    (folder / "processor_config.json").unlink()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    (one, first), (other, second) = [(token, number) for token, number in words.items() if number > 300][:2]
    words[one], words[other] = second, first
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"its token '.+' has the number \d+, the original's \d+"):
        model.add_destination(str(folder))
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="its image_token_id is 7, the original's 3"):
        model.add_destination(str(changed(image_token_id=7, image_token_index=7)))
    shutil.rmtree(folder)
    with pytest.raises(
        ValueError, match=r"cannot answer as .*: vision_feature_select_strategy is 'full', not 'default'; give"
    ):
        model.add_destination(str(changed(vision_feature_select_strategy="full")))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.variant == "original"
    with pytest.raises(ValueError, match="only with original;"):
        model.speak_as("destination")


def test_another_chat_template_is_told(changed: Changed, tiny: Path) -> None:
    folder = changed(vision_feature_layer=-2)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("USER", "HUMAN"))
    with pytest.warns(UserWarning, match="another chat template than the original; both are asked in the original's"):
        VisionLanguageModel.load(str(tiny)).add_destination(str(folder))


def test_a_copy_changes_nothing_and_says_so(changed: Changed, tiny: Path) -> None:
    model = VisionLanguageModel.load(str(tiny))
    with pytest.warns(UserWarning, match="changes nothing, and no concept will shift"):
        model.add_destination(str(changed()))
    assert not model._exchanges["destination"]
