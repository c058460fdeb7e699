"""Parts of a model by role: what belongs to each, what LoRA adapts, what is left frozen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conceptshift.lightning_modules import FineTuning, LoraOptions, VisionLanguageModel
from conceptshift.lightning_modules.backbone.parts import (
    PARTS,
    Part,
    frozen_finder,
    lora_targets,
    part_finder,
    train_only,
)
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Idefics3Config,
    LlamaConfig,
    LlavaConfig,
    PaliGemmaConfig,
    Qwen2VLConfig,
)

ROOT = Path(__file__).resolve().parent.parent
# Linear layers of one block of the tiny model.
VISION = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
LANGUAGE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def llava() -> LlavaConfig:
    """LLaVA-1.5's vision tower, and a few blocks of its language model."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(num_hidden_layers=24),
        text_config=LlamaConfig(num_hidden_layers=2, vocab_size=64),
    )


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


# --- what belongs to a part -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "connectors"),
    [
        (llava(), {"multi_modal_projector"}),
        (PaliGemmaConfig(), {"multi_modal_projector"}),
        (Idefics3Config(), {"connector"}),
        (Qwen2VLConfig(), set()),  # its image encoder ends with what others have as a projector
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_parameter_belongs_to_one_part(config: Any, connectors: set[str]) -> None:
    model = on_meta(config)
    part = part_finder(model)
    tower = {id(parameter) for parameter in model.get_encoder(modality="image").parameters()}
    language = {
        id(parameter)
        for module in (model.get_decoder(), model.get_output_embeddings())
        for parameter in module.parameters()
    }
    rest = set()
    for name, parameter in model.named_parameters():
        expected = (
            "vision_tower" if id(parameter) in tower else "language_model" if id(parameter) in language else "projector"
        )
        assert part(name) == expected, name
        if expected == "projector":
            rest.add(name.split(".")[1])
    assert rest == connectors


def test_an_adapter_changes_no_part(backbone: VisionLanguageModel) -> None:
    before = {name: part_finder(backbone.model)(name) for name, _ in backbone.model.named_modules()}
    backbone.add_lora(LoraConfig(target_modules=["q_proj", "linear_1"]))
    part = part_finder(backbone.model)
    assert {name: part(name) for name in before} == before
    adapted = {part(name) for name, _ in backbone.model.named_parameters() if "lora_" in name}
    assert adapted == set(PARTS)


# --- LoRA -----------------------------------------------------------------------------------------------


def kinds(names: list[str]) -> list[tuple[str, str]]:
    """`(part, kind)` of each, in the tiny model's own names."""
    parts = {"vision_tower": "vision_tower", "multi_modal_projector": "projector", "language_model": "language_model"}
    return sorted((parts[name.split(".")[1]], name.split(".")[-1]) for name in names)


EXPECTED: dict[Part, list[tuple[str, str]]] = {
    "vision_tower": sorted(("vision_tower", kind) for kind in VISION) * 2,
    "projector": [("projector", "linear_1"), ("projector", "linear_2")],
    "language_model": sorted(("language_model", kind) for kind in LANGUAGE) * 3,
}


@pytest.mark.parametrize("parts", [[part] for part in PARTS] + [list(PARTS)], ids=lambda parts: "+".join(parts))
def test_lora_adapts_the_linear_layers_of_a_part(shared_backbone: VisionLanguageModel, parts: list[Part]) -> None:
    names = lora_targets(shared_backbone.model, parts)
    assert kinds(names) == sorted(pair for part in parts for pair in EXPECTED[part])
    assert "lm_head" not in names


def test_by_default_lora_adapts_the_blocks_of_the_language_model(tiny: Path) -> None:
    module = FineTuning(str(tiny), lora=LoraOptions(rank=2))
    module.configure_model()
    adapted = {
        name.removeprefix("_backbone.model.").split(".lora_")[0]
        for name, _ in module.named_parameters()
        if "lora_" in name
    }
    assert kinds(list(adapted)) == sorted(EXPECTED["language_model"])
    assert all(value.requires_grad == ("lora_" in name) for name, value in module.named_parameters())


def test_named_layers_replace_parts(shared_backbone: VisionLanguageModel) -> None:
    model = shared_backbone.model
    names = lora_targets(model, ["language_model"], ["fc1", "layers.2.mlp.up_proj", "lm_head"])
    assert names == [
        *(f"model.vision_tower.encoder.layers.{number}.mlp.fc1" for number in range(2)),
        "model.language_model.layers.2.mlp.up_proj",
        "lm_head",
    ]
    assert lora_targets(model, PARTS, ["fc1"], ["*.encoder.layers.1"]) == names[:1]
    # Endings are whole names.
    with pytest.raises(ValueError, match=r"lora\.target_modules: 'proj' matches no module of LlavaFor"):
        lora_targets(model, PARTS, ["fc1", "proj"])


def test_what_is_frozen_is_not_adapted(shared_backbone: VisionLanguageModel) -> None:
    model = shared_backbone.model
    everything = lora_targets(model, PARTS)
    for patterns, word in ((["*.vision_tower.*.1"], "vision_tower.encoder.layers.1."), (["*.mlp"], ".mlp.")):
        kept = lora_targets(model, PARTS, freeze=patterns)
        assert kept == [name for name in everything if word not in name]
        assert 0 < len(kept) < len(everything)
    with pytest.raises(ValueError, match=r"--model\.init_args\.freeze leaves out every module that LoRA would adapt"):
        lora_targets(model, ["projector"], freeze=["*.linear_?"])


@pytest.mark.parametrize("name", ["colors", "places", "sentiments"])
def test_the_shipped_pairs_freeze_what_llava_does_not_use(name: str) -> None:
    """It reads the states after block 22 of 24 (`vision_feature_layer` −2)."""
    config = llava()
    assert config.vision_feature_layer == -2
    model = on_meta(config)
    options = yaml.safe_load((ROOT / "configs" / "pairs" / f"llava-1.5-7b-{name}.yaml").read_text())
    freeze = options["model"]["init_args"]["freeze"]
    left_out = set(lora_targets(model, PARTS)) - set(lora_targets(model, PARTS, freeze=freeze))
    assert left_out == {name for name in lora_targets(model, PARTS) if ".encoder.layers.23." in name}
    assert len(left_out) == len(VISION)
    train_only(model, None, freeze)
    frozen = {name.rpartition(".")[0] for name, value in model.named_parameters() if not value.requires_grad}
    assert {module.split(".layers.23")[0] for module in frozen} == {
        "model.vision_tower.encoder",
        "model.vision_tower.post_layernorm",
    }


# --- full fine-tuning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [[part] for part in PARTS] + [["vision_tower", "language_model"]])
def test_only_the_parts_are_trained(tiny: Path, parts: list[Part]) -> None:
    module = FineTuning(str(tiny), parts=parts, freeze=["*.post_layernorm"])
    module.configure_model()
    part = part_finder(module.backbone.model)
    for name, parameter in module.backbone.model.named_parameters():
        assert parameter.requires_grad == (part(name) in parts and "post_layernorm" not in name), name


def test_by_default_everything_is_trained(tiny: Path) -> None:
    module = FineTuning(str(tiny))
    module.configure_model()
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_training_from_scratch_keeps_to_the_parts(tiny: Path) -> None:
    module = FineTuning(str(tiny), parts=["projector"], random_weights=True)
    module.configure_model()
    trained = {name.split(".")[3] for name, value in module.named_parameters() if value.requires_grad}
    assert trained == {"multi_modal_projector"}


def test_tied_weights_are_frozen_by_either_name() -> None:
    config = PaliGemmaConfig()
    for name in ("lm_head", "model.language_model.embed_tokens"):
        model = on_meta(config)
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        train_only(model, None, [name])
        assert not model.lm_head.weight.requires_grad
        assert sum(not value.requires_grad for value in model.parameters()) == 1


def test_a_pattern_freezes_what_lies_in_the_module(shared_backbone: VisionLanguageModel) -> None:
    frozen = frozen_finder(shared_backbone.model, ["model.language_model.layers.1", "*.layers.2.mlp.*.weight"])
    assert frozen("model.language_model.layers.1")
    assert frozen("model.language_model.layers.1.mlp.up_proj.weight")
    assert frozen("model.language_model.layers.2.mlp.up_proj.weight")
    assert not frozen("model.language_model.layers.2.mlp.up_proj")
    assert not frozen("model.language_model.layers.10.mlp.up_proj.weight")
    assert not frozen("model.language_model")


# --- errors ---------------------------------------------------------------------------------------------


def test_parts_that_a_model_does_not_have() -> None:
    model = on_meta(Qwen2VLConfig())
    message = r"parts: the projector of Qwen2VL\w+ has no {}; choose among vision_tower, language_model"
    with pytest.raises(ValueError, match=message.format("parameters")):
        train_only(model, ["projector"])
    with pytest.raises(ValueError, match=message.format("linear layers")):
        lora_targets(model, ["language_model", "projector"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.parts=[lungs]"], "lungs"),
        (["--model.parts=[]"], "--model.init_args.parts: expected some of vision_tower, projector, language_model"),
        (
            ["--model.freeze=['*.layers.99']"],
            "--model.init_args.freeze: '*.layers.99' matches no module or parameter of",
        ),
        (["--model.freeze=['*.layers.99']", "--model.lora.rank=2"], "which has model.vision_tower.encoder.layers.0"),
        (["--model.freeze=['*']"], "nothing to train"),
        (
            ["--model.parts=[projector]", "--model.lora.target_modules=[q_proj]"],
            "give either --model.init_args.parts or .lora.target_modules",
        ),
    ],
)
def test_bad_options(fit: Callable[..., Any], options: list[str], message: str) -> None:
    assert message in fit(*options).error


def test_an_unknown_part_without_the_command_line(tiny: Path) -> None:
    parts: list[Any] = ["projector", "lungs"]
    with pytest.raises(ValueError, match=r"parts: expected some of vision_tower, .* got \['projector', 'lungs'\]"):
        FineTuning(str(tiny), parts=parts)


def test_only_linear_layers_are_named(shared_backbone: VisionLanguageModel) -> None:
    modules = dict(shared_backbone.model.named_modules())
    assert all(isinstance(modules[name], nn.Linear) for name in lora_targets(shared_backbone.model, PARTS))
