"""Every method of the installed PEFT as a destination: it says what PEFT says, beside an original that is untouched."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.tests.adapters import TEXT, by_peft, plain, write_adapter
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

_VISION = {"target_modules": r".*vision_tower.*\.(q_proj|v_proj|fc1)", "r": 4}
_PROMPTS = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}

# What a method needs, where it is not modules and a rank.
_OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {**TEXT, "init_r": 4, "target_r": 2, "total_step": 10},
    "BOFT": {**TEXT, "boft_block_size": 16},
    "C3A": {**TEXT, "block_size": 16},
    "CARTRIDGE": _PROMPTS,
    "CPT": {
        "cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4],
        "task_type": "CAUSAL_LM",
    },
    "FOURIERFT": {**TEXT, "n_frequency": 50},
    "IA3": {"target_modules": r".*language_model.*\.(k_proj|down_proj)", "feedforward_modules": r".*down_proj"},
    "LN_TUNING": {"target_modules": r".*language_model.*norm"},
    "MULTITASK_PROMPT_TUNING": {**_PROMPTS, "num_tasks": 1},
    "OFT": {**TEXT, "oft_block_size": 16, "r": 0},
    "OSF": {**TEXT, "effective_rank": 8},
    "P_TUNING": {**_PROMPTS, "encoder_hidden_size": 16},
    "POLY": {**TEXT, "r": 4, "n_tasks": 2, "n_skills": 2},
    "PREFIX_TUNING": _PROMPTS,
    "PROMPT_TUNING": _PROMPTS,
    "TRAINABLE_TOKENS": {"token_indices": [5, 6, 29, 30], "target_modules": ["embed_tokens"]},
    "VBLORA": {**TEXT, "num_vectors": 16, "vector_length": 16},
    "WAVEFT": {**TEXT, "n_frequency": 50},
}  # fmt: skip

# Ways to use a method that write into the model, wrap modules of it, or act where others do not.
_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "bias": ("LORA", {**_VISION, "bias": "all"}),
    "bias of adapted layers": ("LORA", {**_VISION, "bias": "lora_only"}),
    "bias, OFT": ("OFT", {**TEXT, "oft_block_size": 16, "r": 0, "bias": "all"}),
    "PiSSA": ("LORA", {**TEXT, "r": 4, "init_lora_weights": "pissa"}),
    "PiSSA, fast": ("LORA", {**TEXT, "r": 4, "init_lora_weights": "pissa_niter_4"}),
    "OLoRA": ("LORA", {**TEXT, "r": 4, "init_lora_weights": "olora"}),
    "KaSA": ("LORA", {**TEXT, "r": 4, "kasa_config": {}}),
    "MiCA": ("LORA", {**TEXT, "r": 4, "init_lora_weights": "mica"}),
    "DoRA": ("LORA", {**TEXT, "r": 4, "use_dora": True}),
    "VeLoRA": ("LORA", {**TEXT, "r": 4, "velora_config": {}}),
    "bias beside it": ("LORA", {**TEXT, "r": 4, "lora_bias": True}),
    "head": ("LORA", {**TEXT, "r": 4, "modules_to_save": ["lm_head"]}),
    "head, adapted": ("LORA", {"r": 4, "target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "head and embeddings": ("LORA", {**TEXT, "r": 4, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "projector": ("LORA", {**TEXT, "r": 4, "modules_to_save": ["multi_modal_projector"]}),
    "norms": ("LORA", {**TEXT, "r": 4, "modules_to_save": ["norm"]}),
    "tokens": ("LORA", {**TEXT, "r": 4, "trainable_token_indices": [5, 6, 29, 30]}),
    "vision": ("LORA", _VISION),
    "patches": ("LORA", {"target_modules": r".*patch_embedding", "r": 4}),
    "parameters": (
        "LORA", {"target_parameters": ["multi_modal_projector.linear_1.weight"], "target_modules": [], "r": 4},
    ),
    "aLoRA": ("LORA", {**TEXT, "r": 4, "alora_invocation_tokens": [40, 41], "task_type": "CAUSAL_LM"}),
    "head, IA3": (
        "IA3",
        {"target_modules": r".*language_model.*k_proj", "feedforward_modules": [], "modules_to_save": ["lm_head"]},
    ),
    "drawn anew": ("PVERA", {**TEXT, "r": 8, "sample_at_inference": True}),
}  # fmt: skip

# What PEFT itself cannot make of a LLaVA: it needs other parts of a model, or other adapters.
_NOT_OF_A_LLAVA = {"ADAPTION_PROMPT", "SHADOW", "XLORA"}
_REFUSED = {
    **dict.fromkeys(("CARTRIDGE", "CPT", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"), "puts virtual tokens before"),
    "MULTITASK_PROMPT_TUNING": "puts virtual tokens before",
    "POLY": "task_ids",
    "aLoRA": "activated LoRA acts only behind its invocation tokens",
    "drawn anew": "acts in PEFT's own forward",
}

_METHODS = {
    **{name: (name, _OPTIONS.get(name)) for name in (kind.value for kind in PeftType) if name not in _NOT_OF_A_LLAVA},
    **_WAYS,
}


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of an adapter of a method, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            kind, options = _METHODS[name]
            made[name] = write_adapter(tiny, tmp_path_factory.mktemp("adapter") / "it", kind, options)
        return made[name]

    return get


@pytest.fixture(scope="module")
def inputs(shared_backbone: VisionLanguageModel, pictures: list[Image.Image]) -> dict[str, Tensor]:
    return {**shared_backbone.encode([pictures[0], pictures[1]], ["What is it?", "Where?"])}


@pytest.fixture(scope="module")
def untouched(tiny: Path, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the model as transformers alone has them."""
    with torch.no_grad():
        logits: Tensor = plain(tiny)(**inputs).logits
    return logits


def said(model: VisionLanguageModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.model(**inputs).logits
    return logits


@pytest.mark.parametrize("name", sorted(_METHODS.keys() - _REFUSED.keys()))
def test_both_equal_what_peft_and_the_untouched_model_give(
    name: str,
    adapter: Callable[[str], Path],
    tiny: Path,
    inputs: dict[str, Tensor],
    untouched: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, "gcc")  # as BOFT sets them, and leaves them
    folder = adapter(name)
    expected = by_peft(tiny, folder, inputs)
    assert not torch.equal(expected, untouched), "an adapter that changes nothing would test nothing"
    model = VisionLanguageModel.load(str(tiny))
    hashed = model.weights_hash()
    with warnings.catch_warnings(record=True) as told:
        model.add_destination(str(folder))
    assert not [one for one in told if "destination" in str(one.message) or "changes the base" in str(one.message)]
    assert torch.equal(said(model, inputs), untouched), "the original is the default"
    for _ in range(2):
        with model.running_as("destination"):
            assert torch.equal(said(model, inputs), expected)
            with model.running_as("original"):
                assert torch.equal(said(model, inputs), untouched)
            assert torch.equal(said(model, inputs), expected), "what was before comes back"
        assert torch.equal(said(model, inputs), untouched)
    assert model.weights_hash() == hashed
    originals = model._original.tensors()
    assert originals.keys() == dict([*plain(tiny).named_parameters(), *plain(tiny).named_buffers()]).keys()
    for key, value in [*plain(tiny).named_parameters(), *plain(tiny).named_buffers()]:
        assert torch.equal(originals[key], value), key


@pytest.mark.parametrize("name", sorted(_REFUSED))
def test_what_acts_elsewhere_is_refused_by_name(
    name: str, tiny: Path, tmp_path: Path, inputs: dict[str, Tensor], untouched: Tensor
) -> None:
    kind, options = _METHODS[name]
    folder = write_adapter(tiny, tmp_path / "adapter", kind, options)
    model = VisionLanguageModel.load(str(tiny))
    with pytest.raises(ValueError, match=_REFUSED[name]) as error:
        model.add_destination(str(folder))
    assert "\n" not in str(error.value)
    assert torch.equal(said(model, inputs), untouched), "the original is untouched all the same"
    plain_lora = write_adapter(tiny, tmp_path / "plain", "LORA", None)
    model.add_destination(str(plain_lora))
    with model.running_as("destination"):
        assert torch.equal(said(model, inputs), by_peft(tiny, plain_lora, inputs)), "as if it had not been tried"


@pytest.mark.parametrize("kind", sorted(_NOT_OF_A_LLAVA))
def test_what_peft_cannot_make_of_this_model_is_refused_by_name(
    kind: str, tiny: Path, tmp_path: Path, inputs: dict[str, Tensor], untouched: Tensor
) -> None:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](task_type="CAUSAL_LM")
    config.save_pretrained(str(tmp_path))
    save_file({"base_model.model.nothing": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    model = VisionLanguageModel.load(str(tiny))
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=rf"does not fit .* \({kind} ") as error:
        model.add_destination(str(tmp_path))
    assert "\n" not in str(error.value)
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(said(model, inputs), untouched)


def test_all_methods_are_tried() -> None:
    """Of a later PEFT, too: a method that it adds is made here, or named among those that cannot be."""
    tried = {kind for kind, _ in _METHODS.values()}
    assert tried | _NOT_OF_A_LLAVA == {kind.value for kind in PeftType}


def test_destinations_of_all_kinds_beside_each_other(
    adapter: Callable[[str], Path], tiny: Path, inputs: dict[str, Tensor], untouched: Tensor
) -> None:
    """What one writes into the original does not reach the next, in any order of calls."""
    names = ["OLoRA", "tokens", "LORA", "bias", "head", "PiSSA", "norms"]
    model = VisionLanguageModel.load(str(tiny))
    for name in names:
        model.add_destination(str(adapter(name)), name)
    expected = {name: by_peft(tiny, adapter(name), inputs) for name in names}
    for name in (*names, *reversed(names)):
        with model.running_as(name):
            assert torch.equal(said(model, inputs), expected[name]), name
        assert torch.equal(said(model, inputs), untouched), name
    with model.running_as("bias"), model.running_as("PiSSA"), model.running_as("head"):
        assert torch.equal(said(model, inputs), expected["head"])
    assert torch.equal(said(model, inputs), untouched)


def test_a_failure_leaves_the_original_and_the_destinations_before_it(
    adapter: Callable[[str], Path], tiny: Path, tmp_path: Path, inputs: dict[str, Tensor], untouched: Tensor
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(adapter("OLoRA"), damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"\x10")
    for before in ([], ["LORA"]):
        model = VisionLanguageModel.load(str(tiny))
        modules = {name for name, _ in model.named_modules()}
        for name in before:
            model.add_destination(str(adapter(name)), name)
            modules = {name for name, _ in model.named_modules()}
        with pytest.raises(ValueError, match="does not fit"):
            model.add_destination(str(damaged), "damaged")
        assert {name for name, _ in model.named_modules()} == modules
        assert torch.equal(said(model, inputs), untouched)
        for name in before:
            with model.running_as(name):
                assert torch.equal(said(model, inputs), by_peft(tiny, adapter(name), inputs))
        model.add_destination(str(adapter("LORA")), "damaged")
        with model.running_as("damaged"):
            assert torch.equal(said(model, inputs), by_peft(tiny, adapter("LORA"), inputs))


def test_an_adapter_that_changes_nothing_is_told(make_adapter: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    model = VisionLanguageModel.load(str(tiny))
    with pytest.warns(UserWarning, match="the same logits as the original"):
        model.add_destination(str(make_adapter(tiny, tmp_path / "zero", scale=0)))
