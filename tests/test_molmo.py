"""Molmo: equal to an independent reference, loaded from published files, and whole within this framework."""

from __future__ import annotations

import builtins
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.cli.shapes_model import shapes_corpus
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone.molmo import (
    MolmoConfig,
    MolmoForConditionalGeneration,
    MolmoImageProcessor,
    MolmoProcessor,
)
from conceptshift.lightning_modules.backbone.molmo.modeling import MolmoAttention, MolmoRotaryEmbedding
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding

from tests.molmo_reference import (
    Sizes,
    Weights,
    logits,
    patches_of,
    picture_positions,
    published_shapes,
    random_weights,
)
from tests.molmo_tiny import IMAGES, published_config, tiny_tokenizer, write_tiny_molmo

SIZES: Sizes = {
    "vocabulary": 400,
    "additional": 8,
    "width": 48,
    "layers": 3,
    "heads": 6,
    "kv_heads": 2,
    "inner": 40,
    "vision_width": 32,
    "vision_layers": 5,
    "vision_heads": 4,
    "vision_inner": 48,
    "patch": 4,
    "patches": 6,
}
FULL: Sizes = {
    "vocabulary": 152064,
    "additional": 128,
    "width": 3584,
    "layers": 28,
    "heads": 28,
    "kv_heads": 4,
    "inner": 18944,
    "vision_width": 1024,
    "vision_layers": 23,
    "vision_heads": 16,
    "vision_inner": 4096,
    "patch": 14,
    "patches": 24,
}
# Of five blocks the last but one and the last but three.
FEATURE_LAYERS = [3, 1]
PROMPTS = ["What is in it?", "And where is this small thing?"]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


# 1 + 6 and 1 + 2 crops.
PICTURES = [noise(40, 60), noise(30, 20, seed=1)]


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(SIZES)


def write_published(folder: Path, weights: Weights, **changes: Any) -> Path:
    """A folder as published: flat config, two shards, remote code that must not run, files that name it."""
    folder.mkdir()
    ordered = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": ordered[::2], "model-00002-of-00002.safetensors": ordered[1::2]}
    for file, held in shards.items():
        save_file({name: weights[name].contiguous() for name in held}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(published_config(400, **changes)))
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True}))
    for code in ("config_molmo", "modeling_molmo", "image_preprocessing_molmo", "preprocessing_molmo"):
        (folder / f"{code}.py").write_text(f"raise AssertionError('{code} was run')\n")
    processor = {"AutoProcessor": "preprocessing_molmo.MolmoProcessor"}
    image = {**processor, "AutoImageProcessor": "image_preprocessing_molmo.MolmoImageProcessor"}
    (folder / "processor_config.json").write_text(
        json.dumps({"auto_map": processor, "processor_class": "MolmoProcessor"})
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                **IMAGES,
                "auto_map": image,
                "image_processor_type": "MolmoImageProcessor",
                "processor_class": "MolmoProcessor",
            }
        )
    )
    tokenizer = tiny_tokenizer(itertools.islice(shapes_corpus(), 400), 400)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    more = {"auto_map": processor, "chat_template": "{{ 'of another model' }}", "processor_class": "MolmoProcessor"}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **more}))
    # Where it was until transformers 5.
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Path:
    return write_published(tmp_path_factory.mktemp("molmo") / "published", weights)


@pytest.fixture(scope="module")
def tiny_molmo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("molmo") / "tiny"
    return write_tiny_molmo(folder, itertools.islice(shapes_corpus(), 400))


@pytest.fixture(scope="module")
def molmo(tiny_molmo: Path) -> VisionLanguageModel:
    """Tests must not change it."""
    return VisionLanguageModel.load(str(tiny_molmo))


# --- equality with the reference -----------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("picture", [*PICTURES, None], ids=["six crops", "two crops", "text only"])
def test_logits_are_those_of_the_reference(
    published: Path, weights: Weights, attention: str, picture: Image.Image | None
) -> None:
    model = load(published, attn_implementation=attention)
    processor = AutoProcessor.from_pretrained(published)
    text = "<|endoftext|> User: What is in it? Assistant:"
    ours: dict[str, Tensor] = {}
    if picture is None:
        inputs = processor(text=text, return_tensors="pt")
    else:
        inputs = processor(images=[picture], text=text.replace("> ", "><|image|> "), return_tensors="pt")
        tiling = processor.image_processor.tiling(picture.width, picture.height)
        ours = {
            "images": patches_of(inputs["pixel_values"][0], 4),
            "image_masks": inputs["image_masks"][0],
            "image_input_idx": picture_positions(tiling, 3, 1, 1),
        }
        assert (inputs["image_masks"] == -1).any()
    expected = logits(weights, SIZES, FEATURE_LAYERS, inputs["input_ids"][0], **ours)
    with torch.no_grad():
        given = model(**inputs).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


def test_every_mask_has_its_effect(published: Path, weights: Weights) -> None:
    model = load(published)
    inputs = AutoProcessor.from_pretrained(published)(
        images=PICTURES[:1], text="<|endoftext|><|image|> User: a Assistant:", return_tensors="pt"
    )
    masks = torch.tensor([0.0, 0.5, 1.0, -1.0]).repeat(9 * 7).reshape(1, 7, 36)
    with torch.no_grad():
        given = model(**{**inputs, "image_masks": masks}).logits[0]
    expected = logits(
        weights,
        SIZES,
        FEATURE_LAYERS,
        inputs["input_ids"][0],
        patches_of(inputs["pixel_values"][0], 4),
        masks[0],
        picture_positions((3, 2), 3, 1, 1),
    )
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


def test_rotations_are_not_rounded(molmo: VisionLanguageModel) -> None:
    config = molmo.model.config.text_config
    positions = torch.arange(2000, 2006)[None]
    states = torch.randn(1, 6, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    kept: dict[type, Tensor] = {}
    for attention, rotary in ((MolmoAttention, MolmoRotaryEmbedding), (Qwen2Attention, Qwen2RotaryEmbedding)):
        torch.manual_seed(0)
        cache: Any = DynamicCache()
        block = attention(config, 0).bfloat16()
        with torch.no_grad():
            mixed, _ = block(states, rotary(config)(states, positions), None, cache)
            keys = block.k_proj(states).float()[0].unflatten(1, (2, 8))
        kept[attention] = cache.layers[0].keys[0].transpose(0, 1)
        assert mixed.dtype == kept[attention].dtype == torch.bfloat16
    angles = positions[0, :, None] * 1e6 ** (-torch.arange(4) / 4)
    first, second = keys.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat([turned.real, turned.imag], dim=-1).bfloat16()
    assert torch.equal(kept[MolmoAttention], expected)
    assert not torch.equal(kept[Qwen2Attention], expected)


# --- files ---------------------------------------------------------------------------------------------------


def test_the_real_size_has_the_published_weights() -> None:
    config = MolmoConfig()
    with torch.device("meta"):
        model: Any = MolmoForConditionalGeneration(config)
    # The tower is built in full though its last block is not needed.
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_021_025_280
    saved = {name: tuple(value.shape) for name, value in revert_weight_conversion(model, model.state_dict()).items()}
    assert saved == published_shapes(FULL)
    assert len(saved) == 585
    assert config.image_token_id == 152066
    assert config.text_config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert model.get_output_embeddings().weight.shape == (152064, 3584)
    assert model.get_input_embeddings().weight.shape == (152192, 3584)


def test_remote_code_is_never_run(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("asked whether to run remote code")

    monkeypatch.setattr(builtins, "input", refuse)
    assert type(AutoConfig.from_pretrained(published)) is MolmoConfig
    assert type(AutoImageProcessor.from_pretrained(published)) is MolmoImageProcessor
    processor: Any = AutoProcessor.from_pretrained(published)
    assert type(processor) is MolmoProcessor
    turns: Any = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert "User:" in processor.apply_chat_template(turns)
    assert type(load(published)) is MolmoForConditionalGeneration
    loaded = VisionLanguageModel.load(str(published))
    loaded.self_check()


def test_a_template_that_places_no_picture_is_not_taken(published: Path, tmp_path: Path) -> None:
    # Saved anew, the tokenizer has its template in the file that is the processor's.
    loaded = AutoProcessor.from_pretrained(published)
    folder = shutil.copytree(published, tmp_path / "anew")
    (folder / "chat_template.jinja").write_text("{{ 'of another model' }}")
    assert AutoProcessor.from_pretrained(folder).chat_template == loaded.chat_template
    (folder / "chat_template.jinja").write_text("{{ '<|image|>' }} mine")
    assert AutoProcessor.from_pretrained(folder).chat_template == "{{ '<|image|>' }} mine"


def test_the_published_generation_config_gets_an_end(published: Path) -> None:
    model = load(published)
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 0
    assert MolmoConfig().text_config.eos_token_id == 151643


def test_weights_that_are_missing_or_too_many_are_told(published: Path, weights: Weights, tmp_path: Path) -> None:
    _, told = load(published, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    fewer = {name: value for name, value in weights.items() if "blocks.1.att_proj.bias" not in name}
    fewer["model.transformer.other.weight"] = torch.zeros(2)
    folder = write_published(tmp_path / "fewer", fewer)
    _, told = load(folder, output_loading_info=True)
    attention = "language_model.layers.1.self_attn"
    assert set(told["missing_keys"]) == {f"{attention}.{letter}_proj.bias" for letter in "qkv"}
    assert set(told["unexpected_keys"]) == {"model.transformer.other.weight"}


def test_saved_models_have_the_published_names(published: Path, weights: Weights, tmp_path: Path) -> None:
    model = load(published)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == set(weights)
    for name, value in weights.items():
        assert torch.equal(saved[name], value), name
    again, told = load(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    configs = [json.loads(one.config.to_json_string(use_diff=False)) for one in (again, model)]
    assert {name for name in configs[0] if configs[0][name] != configs[1][name]} == {"_name_or_path"}
    assert configs[0].keys() == configs[1].keys()
    assert "auto_map" not in configs[0]


def test_frequencies_are_right_after_loading(published: Path) -> None:
    model = load(published, dtype=torch.bfloat16)
    expected = 1e6 ** (-torch.arange(4) / 4)
    given = model.language_model.rotary_emb.inv_freq
    torch.testing.assert_close(given, expected)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.get_decoder().embed_tokens is model.get_input_embeddings()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"norm_after": True}, "norm_after is True"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"weight_tying": True}, "tying"),
    ],
)
def test_other_molmos_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"config.json: .*{told}.*; of the Molmo models only those built as"):
        MolmoConfig(**published_config(400, **change))


# --- batches and generation ----------------------------------------------------------------------------------


def test_batches_are_their_samples(molmo: VisionLanguageModel) -> None:
    inputs = molmo.encode(PICTURES, PROMPTS)
    right = molmo.encode(PICTURES, PROMPTS, ["red", "a blue box"])
    assert inputs["pixel_values"].shape[1] == 7
    # The same prompts padded on the other side.
    given = {"left": molmo.logits(inputs), "right": molmo.logits(right)}
    for row, (picture, prompt) in enumerate(zip(PICTURES, PROMPTS, strict=True)):
        alone = molmo.encode([picture], [prompt])
        expected = molmo.logits(alone)[0]
        length = len(expected)
        torch.testing.assert_close(given["left"][row, -length:], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(given["right"][row, :length], expected, atol=1e-5, rtol=1e-4)


def test_positions_count_tokens_only(molmo: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    rotate = MolmoRotaryEmbedding.forward

    def watched(self: Any, x: Tensor, position_ids: Tensor) -> Any:
        seen.append(position_ids)
        return rotate(self, x, position_ids)

    monkeypatch.setattr(MolmoRotaryEmbedding, "forward", watched)
    inputs = molmo.encode(PICTURES, PROMPTS)
    padded = int((inputs["attention_mask"][1] == 0).sum())
    length = inputs["input_ids"].shape[1]
    assert padded > 0
    with torch.no_grad():
        cache = molmo.model(**inputs, use_cache=True).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        molmo.model(input_ids=torch.tensor([[5], [6]]), attention_mask=mask, past_key_values=cache)
    assert seen[0][0].tolist() == list(range(length))
    assert seen[0][1].tolist() == [0] * padded + list(range(length - padded))
    assert seen[1].tolist() == [[length], [length - padded]]


def test_generation_uses_its_cache(molmo: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    tower = type(molmo.model.vision_tower)
    forward = tower.forward

    def counted(self: Any, pixels: Tensor) -> Any:
        looked.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(tower, "forward", counted)
    inputs = molmo.encode(PICTURES, PROMPTS)
    given = molmo.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    # Crops that only fill the batch are not looked at.
    assert looked == [7 + 3]
    for row, (picture, prompt) in enumerate(zip(PICTURES, PROMPTS, strict=True)):
        alone = dict(molmo.encode([picture], [prompt]))
        for token in given[row, inputs["input_ids"].shape[1] :].tolist():
            with torch.no_grad():
                assert int(molmo.model(**alone, use_cache=False).logits[0, -1].argmax()) == token
            alone["input_ids"] = torch.cat([alone["input_ids"], torch.tensor([[token]])], dim=1)
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
            if token == molmo.tokenizer.eos_token_id:
                break


def test_answers_depend_on_the_picture(molmo: VisionLanguageModel) -> None:
    first, second = (molmo.logits(molmo.encode([picture], ["What?"]))[0, -1] for picture in PICTURES)
    assert (first - second).abs().max() > 0.1


def test_pictures_without_their_tokens_are_refused(molmo: VisionLanguageModel) -> None:
    inputs = dict(molmo.encode(PICTURES[:1], PROMPTS[:1]))
    ids = inputs["input_ids"].clone()
    ids[0, 2] = 5
    with pytest.raises(ValueError, match=r"input_ids have \[28\] `<im_patch>` a row where patch_numbers place \[29\]"):
        molmo.model(**{**inputs, "input_ids": ids})
    with pytest.raises(ValueError, match="pixel_values need input_ids, image_masks and patch_numbers"):
        molmo.model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])


def test_loss_is_the_mean_over_labels(molmo: VisionLanguageModel) -> None:
    inputs = molmo.encode(PICTURES, PROMPTS, ["red", "a blue box"])
    with torch.no_grad():
        out = molmo.forward(inputs)
    log_p = out.logits[:, :-1].log_softmax(-1)
    labels = inputs["labels"][:, 1:]
    expected = -log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0][labels >= 0].mean()
    torch.testing.assert_close(out.loss, expected)


def test_last_logits_alone(molmo: VisionLanguageModel) -> None:
    inputs = molmo.encode(PICTURES, PROMPTS)
    with torch.no_grad():
        last = molmo.model(**inputs, logits_to_keep=1).logits
        every = molmo.model(**inputs, output_hidden_states=True)
    torch.testing.assert_close(last, every.logits[:, -1:])
    assert len(every.hidden_states) == 4


# --- within the framework ------------------------------------------------------------------------------------


def test_framework_reads_and_generates(molmo: VisionLanguageModel) -> None:
    molmo.self_check()
    sites = molmo.sites(["lm.block.*", "projector", "lm.norm"])
    assert [site.name for site in sites] == [*(f"lm.block.{n}" for n in range(3)), "projector", "lm.norm"]
    assert len(molmo.sites(["vision.block.*"])) == 5
    assert len(molmo.vocabulary) == 400
    answered = molmo.generate(molmo.encode(PICTURES, PROMPTS), 4, sites)
    assert len(answered.texts) == 2
    read = molmo.read(molmo.encode(PICTURES, PROMPTS, ["red", "a blue box"]), sites)
    assert read.texts == ["red", "a blue box"]
    # Nine tokens of the whole picture, and those of the crops put together.
    assert (read.token_map.image_index.amax(dim=1) + 1).tolist() == [9 + 5 * 4, 9 + 3 * 4]


def test_visual_tokens_lie_where_their_pixels_are(molmo: VisionLanguageModel) -> None:
    # 60 by 40 pixels become 40 by 26 in a frame of 40 by 32: three by two crops, together five by four tokens.
    grid = molmo.patch_grid(40, 60)
    assert len(grid.boxes) == 9 + 5 * 4
    rows, columns = torch.cartesian_prod(torch.arange(5), torch.arange(4)).unbind(dim=1)
    corners = torch.stack([columns * 8 - 3, rows * 8, columns * 8 + 5, rows * 8 + 8], dim=1)
    scale = torch.tensor([26 / 40, 40 / 60, 26 / 40, 40 / 60])
    torch.testing.assert_close(grid.boxes[9:], corners / scale, atol=0.2, rtol=0)
    whole = torch.tensor([0.0, 0.0, 8.0, 8.0]) - torch.tensor([4.0, 0.0, 4.0, 0.0])
    torch.testing.assert_close(grid.boxes[0], whole / (24 / 60), atol=0.2, rtol=0)


def test_zero_adapter_changes_nothing(tiny_molmo: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    loaded = VisionLanguageModel.load(str(tiny_molmo))
    inputs = loaded.encode(PICTURES, PROMPTS)
    before = loaded.logits(inputs)
    loaded.load_adapter(str(make_adapter(tiny_molmo, tmp_path / "zero", 0.0)))
    adapted = {name.split(".")[-4] for name, _ in loaded.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert torch.equal(loaded.logits(inputs), before)
    changed = VisionLanguageModel.load(str(tiny_molmo), adapter=str(make_adapter(tiny_molmo, tmp_path / "some", 0.3)))
    assert not torch.allclose(changed.logits(inputs), before, atol=1e-2)
    with changed.running_as("original"):
        assert torch.equal(changed.logits(inputs), before)


def test_adapters_learn_with_checkpointed_activations(tiny_molmo: Path) -> None:
    gradients = []
    for saving in (False, True):
        torch.manual_seed(0)
        loaded = VisionLanguageModel.load(str(tiny_molmo))
        loaded.add_lora(LoraConfig(r=2, task_type="CAUSAL_LM"))
        model = loaded.model
        if saving:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        loaded.forward(loaded.encode(PICTURES, PROMPTS, ["red", "a blue box"])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.eval()
    assert gradients[0].keys() == gradients[1].keys()
    assert all("lora_" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_all_that_is_used_can_learn(tiny_molmo: Path) -> None:
    loaded = VisionLanguageModel.load(str(tiny_molmo))
    loaded.forward(loaded.encode(PICTURES, PROMPTS, ["red", "a blue box"])).loss.backward()
    unused = {name for name, parameter in loaded.model.named_parameters() if parameter.grad is None}
    # Behind the last block that is read.
    assert unused
    assert all(name.startswith("vision_tower.layers.4.") for name in unused)
    embedding = loaded.model.get_input_embeddings().weight.grad
    assert embedding[loaded.tokenizer.pad_token_id].abs().sum() > 0, "what pads also begins a text"


def test_random_weights_from_the_configuration(published: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(published, tmp_path / "no-weights", ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.manual_seed(0)
    loaded = VisionLanguageModel.load(str(folder), random_weights=True)
    assert all(parameter.isfinite().all() for parameter in loaded.model.parameters())
    loaded.self_check()
    loaded.save(tmp_path / "saved")
    again = VisionLanguageModel.load(str(tmp_path / "saved"))
    inputs = loaded.encode(PICTURES, PROMPTS)
    assert torch.equal(again.logits(inputs), loaded.logits(inputs))
