"""Adapters as others have them: with names of earlier versions, a grown vocabulary, layers that lack."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import FineTuning, VisionLanguageModel
from conceptshift.lightning_modules.backbone.readout import Readout
from conceptshift.tests.adapters import TEXT, by_peft, plain, write_adapter
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def inputs(shared_backbone: VisionLanguageModel, pictures: list[Image.Image]) -> dict[str, Tensor]:
    return {**shared_backbone.encode(pictures[:2], ["What is it?", "Where?"])}


def said(model: VisionLanguageModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.model(**inputs).logits
    return logits


def edit(folder: Path, rename: Callable[[str], str] | None = None, **options: Any) -> Path:
    """Change the names in an adapter's weights, and options of its configuration."""
    if rename is not None:
        weights = {rename(key): value for key, value in load_file(folder / "adapter_model.safetensors").items()}
        save_file(weights, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **options}))
    return folder


# --- names of earlier versions ----------------------------------------------------------------------------


def before_4_52(key: str) -> str:
    """A name of a LLaVA's as transformers before 4.52 had it: the parts at the top, the head in the language model."""
    for new, old in (
        ("base_model.model.model.language_model.", "base_model.model.language_model.model."),
        ("base_model.model.lm_head", "base_model.model.language_model.lm_head"),
        ("base_model.model.model.vision_tower.", "base_model.model.vision_tower.vision_model."),
        ("base_model.model.model.multi_modal_projector", "base_model.model.multi_modal_projector"),
    ):
        if key.startswith(new):
            return old + key.removeprefix(new)
    return key


_LISTED = [f"language_model.model.layers.{number}.self_attn.{name}_proj" for number in range(3) for name in "qv"]
_PATTERN = r"language_model.*\.(q_proj|v_proj)"

OLD: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "pattern": ("LORA", {**TEXT, "r": 4}, {"target_modules": _PATTERN}),
    "list": ("LORA", {**TEXT, "r": 4}, {"target_modules": _LISTED}),
    "endings": ("LORA", {"target_modules": ["q_proj", "fc1"], "r": 4}, {}),
    "some layers": (
        "LORA",
        {"target_modules": r".*language_model.*\.[12]\..*q_proj", "r": 4},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "exclude_modules": r"vision_tower.*"},
    ),
    "all but": (
        "LORA",
        {"target_modules": r".*language_model.*q_proj", "r": 4},
        {"target_modules": ["q_proj"], "exclude_modules": r"vision_tower.*"},
    ),
    "ranks": (
        "LORA",
        {**TEXT, "r": 4, "rank_pattern": {"model.language_model.layers.1.self_attn.q_proj": 2}},
        {"target_modules": _PATTERN, "rank_pattern": {"language_model.model.layers.1.self_attn.q_proj": 2}},
    ),
    "scales": (
        "LORA",
        {**TEXT, "r": 4, "alpha_pattern": {r"language_model\.layers\.[12]\..*": 64}},
        {"target_modules": _PATTERN, "alpha_pattern": {r"language_model\.model\.layers\.[12]\..*": 64}},
    ),
    "scales of another method": (
        "LOKR",
        {"target_modules": ["q_proj"], "r": 4, "alpha_pattern": {"model.language_model.layers.0.*": 64}},
        {"alpha_pattern": {"language_model.model.layers.0.*": 64}},
    ),
    "frequencies": (
        "FOURIERFT",
        {**TEXT, "n_frequency": 50, "n_frequency_pattern": {"language_model.layers.1.*": 20}},
        {"target_modules": _PATTERN, "n_frequency_pattern": {"language_model.model.layers.1.*": 20}},
    ),
    "parameters": (
        "LORA",
        {"target_modules": [], "r": 4, "target_parameters": ["model.language_model.layers.1.mlp.up_proj.weight"]},
        {"target_parameters": ["language_model.model.layers.1.mlp.up_proj.weight"]},
    ),
    "norm, named by its end": (
        "LORA",
        {**TEXT, "r": 4, "modules_to_save": ["language_model.norm"]},
        {"target_modules": _PATTERN, "modules_to_save": ["model.norm"]},
    ),
    "vision tower": ("LORA", {"target_modules": r".*vision_tower.*fc1", "r": 4}, {"target_modules": r"vision.*fc1"}),
    "projector": (
        "LORA",
        {**TEXT, "r": 4, "modules_to_save": ["multi_modal_projector"]},
        {"target_modules": _PATTERN},
    ),
    "head": ("LORA", {**TEXT, "r": 4, "modules_to_save": ["lm_head"]}, {"target_modules": _PATTERN}),
    "head, named whole": (
        "LORA",
        {**TEXT, "r": 4, "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": _PATTERN, "modules_to_save": ["language_model.lm_head", "language_model.model.norm"]},
    ),
    "head, adapted": (
        "LORA",
        {"target_modules": r".*language_model.*(q_proj|embed_tokens)|lm_head", "r": 4},
        {"target_modules": r"language_model.*(q_proj|lm_head|embed_tokens)"},
    ),
    "tokens": ("LORA", {**TEXT, "r": 4, "trainable_token_indices": [5, 30]}, {"target_modules": _PATTERN}),
    "tokens alone": ("TRAINABLE_TOKENS", {"token_indices": [5, 30], "target_modules": ["embed_tokens"]}, {}),
    "PiSSA": ("LORA", {**TEXT, "r": 4, "init_lora_weights": "pissa"}, {"target_modules": _PATTERN}),
    "IA3": (
        "IA3",
        {"target_modules": r".*language_model.*(k_proj|down_proj)", "feedforward_modules": r".*down_proj"},
        {"target_modules": r"language_model.*(k_proj|down_proj)", "feedforward_modules": r"language_model.*down_proj"},
    ),
    "norms": ("LN_TUNING", {"target_modules": r".*language_model.*norm"}, {"target_modules": r"language_model.*norm"}),
    "VBLORA": ("VBLORA", {**TEXT, "num_vectors": 16, "vector_length": 16}, {"target_modules": _PATTERN}),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_an_adapter_with_names_of_before(name: str, tiny: Path, tmp_path: Path, inputs: dict[str, Tensor]) -> None:
    kind, options, then = OLD[name]
    folder = write_adapter(tiny, tmp_path / "adapter", kind, options)
    expected = by_peft(tiny, folder, inputs)
    model = VisionLanguageModel.load(str(tiny))
    own = said(model, inputs)
    hashed = {path.name: path.read_bytes() for path in edit(folder, before_4_52, **then).iterdir()}
    model.add_destination(str(folder))
    assert torch.equal(said(model, inputs), own)
    with model.running_as("destination"):
        assert torch.equal(said(model, inputs), expected)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == hashed, "the user's files stay as they are"


# --- layers that lack -------------------------------------------------------------------------------------


def test_layers_that_lack_or_are_not_the_model_s(tiny: Path, tmp_path: Path, inputs: dict[str, Tensor]) -> None:
    folder = write_adapter(tiny, tmp_path / "adapter", "LORA", {**TEXT, "r": 4})
    weights = load_file(folder / "adapter_model.safetensors")
    model = VisionLanguageModel.load(str(tiny))
    own = said(model, inputs)
    first = next(iter(weights))
    save_file({key: value for key, value in weights.items() if key != first}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"no weights for layers that its configuration names, e\.g\. .*lora_A"):
        model.add_destination(str(folder))
    more = first.replace("layers.0", "layers.7")
    save_file({**weights, more: weights[first].clone()}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"its layers are not this model's, e\.g\. .*layers\.7"):
        model.add_destination(str(folder))
    assert torch.equal(said(model, inputs), own)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


# --- a grown vocabulary -----------------------------------------------------------------------------------

GROWN: dict[str, dict[str, Any]] = {
    "head and embeddings": {**TEXT, "r": 4, "modules_to_save": ["lm_head", "embed_tokens"]},
    "head, adapted": {"target_modules": ["q_proj", "lm_head"], "r": 4},
}


@pytest.mark.parametrize("name", GROWN)
def test_an_adapter_with_more_tokens(name: str, tiny: Path, tmp_path: Path, inputs: dict[str, Tensor]) -> None:
    """As it was trained: beside a model whose embeddings were made larger."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens([f"<new{number}>" for number in range(5)])
    torch.manual_seed(1)
    larger = plain(tiny)
    larger.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    trained: Any = PeftModel(larger, LoraConfig(**GROWN[name]))
    with torch.no_grad():
        for value in trained.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
        expected = trained.eval()(**inputs).logits
    trained.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    model = VisionLanguageModel.load(str(tiny))
    own = said(model, inputs)
    model.add_destination(str(tmp_path / "adapter"))
    for _ in range(2):
        assert torch.equal(said(model, inputs), own)
        assert len(model.vocabulary) == own.shape[-1]
        with model.running_as("destination"):
            assert torch.equal(said(model, inputs), expected)
            assert model.vocabulary[-1] == "<new4>"


def test_an_adapter_of_another_model_of_the_hub_is_told(tiny: Path, tmp_path: Path) -> None:
    """Of the same shapes, so that nothing else tells."""
    folder = write_adapter(tiny, tmp_path / "adapter", "LORA", {**TEXT, "r": 4})
    loaded = VisionLanguageModel.load(str(tiny))
    model = VisionLanguageModel(loaded.model, loaded.processor, "someone/llava")
    with pytest.warns(UserWarning, match=r"trained from 'another/llava', and this is 'someone/llava'"):
        model.add_destination(str(edit(folder, base_model_name_or_path="another/llava")), "one")
    with warnings.catch_warnings(record=True) as told:
        for number, base in enumerate(("someone/llava", "/home/someone/model", None)):
            model.add_destination(str(edit(folder, base_model_name_or_path=base)), f"other{number}")
    assert not [one for one in told if "trained from" in str(one.message)]


def test_loading_leaves_no_trace_in_what_is_drawn(tiny: Path, tmp_path: Path) -> None:
    folder = write_adapter(tiny, tmp_path / "adapter", "LORA", {**TEXT, "r": 4, "init_lora_weights": "pissa_niter_4"})
    model = VisionLanguageModel.load(str(tiny))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.add_destination(str(folder))
    assert torch.equal(torch.rand(3), expected)


def test_names_that_are_parts_of_others(tiny: Path, tmp_path: Path, inputs: dict[str, Tensor]) -> None:
    """Of other destinations, and of the names of tensors, in which PEFT looks for them."""
    names = ["run10", "run1", "destination", "dest", "lora_A", "weight", "lora", "q_proj", "0", "a", "base_model"]
    kinds: list[dict[str, Any]] = [{**TEXT, "r": 2}, {"target_modules": ["fc1"], "r": 4}]
    folders = [write_adapter(tiny, tmp_path / str(n), "LORA", kinds[n % 2], seed=n) for n in range(len(names))]
    model = VisionLanguageModel.load(str(tiny))
    for name, folder in zip(names, folders, strict=True):
        model.add_destination(str(folder), name)
    for name, folder in zip(names, folders, strict=True):
        with model.running_as(name):
            assert torch.equal(said(model, inputs), by_peft(tiny, folder, inputs)), name


def test_weights_that_are_no_numbers(tiny: Path, tmp_path: Path) -> None:
    folder = write_adapter(tiny, tmp_path / "adapter", "LORA", {**TEXT, "r": 4})
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key: value * float("nan") for key, value in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="its logits are not finite numbers"):
        VisionLanguageModel.load(str(tiny)).add_destination(str(folder))


def test_a_size_that_cannot_be_is_told_with_both_sizes(tiny: Path, make_model: Run, tmp_path: Path) -> None:
    """The reason is not cut off before it says what is wrong."""
    folder = write_adapter(make_model(text_width=96), tmp_path / "adapter", "LORA", {**TEXT, "r": 4})
    with pytest.raises(ValueError, match=r"size mismatch for .*96.*64") as error:
        VisionLanguageModel.load(str(tiny)).add_destination(str(folder))
    assert "\n" not in str(error.value)


# --- what reads the model ---------------------------------------------------------------------------------


def test_words_of_the_original_beside_a_head_of_another(
    tiny: Path, tmp_path: Path, predict: Run, pictures: list[Image.Image]
) -> None:
    """The store's readout, the vocabulary, the final norm: of whom they are asked for."""
    folder = write_adapter(tiny, tmp_path / "adapter", "LORA", {**TEXT, "r": 4, "modules_to_save": ["lm_head", "norm"]})
    weights = load_file(folder / "adapter_model.safetensors")
    (head,) = [value for key, value in weights.items() if "lm_head" in key]
    (norm,) = [value for key, value in weights.items() if key.endswith("language_model.norm.weight")]
    base = plain(tiny)
    done = predict(tmp_path / "store", f"--model.destination={folder}", "--data.limit=2")
    assert done.status == 0, done.err
    readout = Readout.load(tmp_path / "store")
    assert torch.equal(readout.unembedding, base.lm_head.weight)
    assert readout.norm is not None
    states = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(readout.norm(states), base.model.language_model.norm(states), atol=1e-6)
    assert FeatureStore(tmp_path / "store").metadata["weights_hash"] == readout.weights_hash

    model = VisionLanguageModel.load(str(tiny))
    model.add_destination(str(folder))
    assert torch.equal(model.unembed.weight, base.lm_head.weight)
    with model.running_as("destination"):
        assert torch.equal(model.unembed.weight, head)
        assert torch.equal(model.unembed(states), states @ head.T)
        assert torch.equal(_weight(model.final_norm), norm)
        model.self_check()
        inputs = model.encode([pictures[0]], ["?"])
        lens = model.generate(inputs, 2, model.sites(["lm.block.2", "lm.norm"])).states
        assert torch.allclose(model.final_norm(lens["lm.block.2"]), lens["lm.norm"], atol=1e-5)
    assert torch.equal(model.unembed.weight, base.lm_head.weight)
    assert torch.equal(_weight(model.final_norm), base.model.language_model.norm.weight)


def test_words_are_the_original_s_while_an_adapter_speaks(tiny: Path, tmp_path: Path) -> None:
    """A module that was given an adapter answers as it, and reads concepts as the original."""
    folder = write_adapter(tiny, tmp_path / "adapter", "LORA", {**TEXT, "r": 4, "modules_to_save": ["lm_head"]})
    (head,) = [value for key, value in load_file(folder / "adapter_model.safetensors").items() if "lm_head" in key]
    module = FineTuning(str(tiny), adapter=str(folder))
    module.configure_model()
    assert torch.equal(module.backbone.unembed.weight, head)
    assert torch.equal(module.readout.unembedding, plain(tiny).lm_head.weight)
    assert torch.equal(module.backbone.unembed.weight, head), "it goes on speaking"


def _weight(module: nn.Module) -> Tensor:
    found = module.weight
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("part", ["layers.1.mlp", "layers.1", "language_model"])
def test_sites_in_a_part_that_an_adapter_has_of_its_own(
    part: str, tiny: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    """A feed-forward network, a block, the whole language model: what is read is in the one that speaks."""
    options = {"target_modules": r".*vision_tower.*q_proj", "r": 4, "modules_to_save": [part]}
    folder = write_adapter(tiny, tmp_path / "adapter", "LORA", options)
    model = VisionLanguageModel.load(str(tiny))
    raw = "model.language_model.layers.1.mlp.up_proj"
    names = [raw, "lm.block.0", "lm.block.1", "lm.block.2", "lm.norm"]
    inputs = model.encode([pictures[0]], ["?"], ["a"])
    before = model.sites(names)
    own = model.read(inputs, before).states
    peft: Any = PeftModel.from_pretrained(plain(tiny), folder).eval()
    merged = peft.merge_and_unload()
    expected: dict[str, Tensor] = {}
    layers = merged.model.language_model.layers
    for name, module in zip(names, (layers[1].mlp.up_proj, *layers, merged.model.language_model.norm), strict=True):
        module.register_forward_hook(
            lambda one, given, state, name=name: expected.__setitem__(
                name, state[0] if isinstance(state, tuple) else state
            )
        )
    with torch.no_grad():
        merged(**{key: value for key, value in inputs.items() if key != "labels"})
    model.add_destination(str(folder))
    for sites in (before, model.sites(names)):
        with model.running_as("destination"):
            theirs = model.read(inputs, sites).states
            model.self_check()
        for name, states in expected.items():
            torch.testing.assert_close(theirs[name], states, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(theirs[name], own[name], atol=1e-3), name
        again = model.read(inputs, sites).states
        assert all(torch.equal(again[name], states) for name, states in own.items())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LORA", {"target_modules": ["lm_head"], "r": 4}),
        ("LORA", {"target_modules": ["lm_head"], "r": 4, "use_dora": True}),
        ("LORA", {**TEXT, "r": 4, "trainable_token_indices": {"lm_head": [5, 30]}}),
        ("IA3", {"target_modules": ["lm_head"], "feedforward_modules": []}),
    ],
)
def test_the_unembedding_is_that_of_who_speaks(kind: str, options: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    """Also where an adapter is beside it and not in it: against PEFT's own merging."""
    folder = write_adapter(tiny, tmp_path / "adapter", kind, options)
    peft: Any = PeftModel.from_pretrained(plain(tiny), folder)
    merged = peft.merge_and_unload().lm_head.weight
    model = VisionLanguageModel.load(str(tiny))
    own = model.unembed.weight
    model.add_destination(str(folder))
    with model.running_as("destination"):
        torch.testing.assert_close(model.unembed.weight, merged, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(Readout.from_model(model).unembedding, merged, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(model.unembed.weight, own, atol=1e-3)
    assert torch.equal(model.unembed.weight, own)
    assert torch.equal(Readout.from_model(model).unembedding, own)


def test_sites_that_were_found_before_an_adapter_came(tiny: Path, tmp_path: Path, pictures: list[Image.Image]) -> None:
    """A layer that it adapts, and a norm that it has of its own: the states are those behind them."""
    folder = write_adapter(tiny, tmp_path / "adapter", "LORA", {**TEXT, "r": 4, "modules_to_save": ["norm"]})
    layer = "model.language_model.layers.1.self_attn.q_proj"
    model = VisionLanguageModel.load(str(tiny))
    sites = model.sites([layer, "lm.norm", "lm.block.1"])
    inputs = model.encode([pictures[0]], ["?"], ["a"])
    own = model.read(inputs, sites).states
    model.add_destination(str(folder))
    peft: Any = PeftModel.from_pretrained(plain(tiny), folder).eval()
    expected: dict[str, Tensor] = {}
    inner = peft.base_model.model
    for name, module in ((layer, inner.get_submodule(layer)), ("lm.norm", inner.model.language_model.norm)):
        module.register_forward_hook(lambda one, given, state, name=name: expected.__setitem__(name, state))
    with torch.no_grad():
        peft(**{key: value for key, value in inputs.items() if key != "labels"})
    with model.running_as("destination"):
        theirs = model.read(inputs, sites).states
        assert [site.name for site in model.sites(["model.language_model.layers.1.self_attn.q_*"])] == [layer]
    for name, states in expected.items():
        assert torch.equal(theirs[name], states), name
        assert not torch.equal(own[name], states), name
    again = model.read(inputs, sites).states
    assert all(torch.equal(again[name], states) for name, states in own.items())


def test_biases_of_the_original_are_not_trained(tiny: Path) -> None:
    with pytest.raises(ValueError, match="so that there is no original to compare with; use lora_bias=True"):
        VisionLanguageModel.load(str(tiny)).add_lora(LoraConfig(bias="all"))


def test_an_adapter_that_begins_inside_the_weights(tiny: Path, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    """PiSSA moves a part of the weights into the adapter: the original keeps them whole, before and after training."""
    model = VisionLanguageModel.load(str(tiny))
    own = said(model, inputs)
    model.add_lora(LoraConfig(r=4, target_modules=r".*language_model.*q_proj", init_lora_weights="pissa"))
    assert torch.allclose(said(model, inputs), own, atol=1e-4), "nothing is trained yet"
    trained = [value for value in model.parameters() if value.requires_grad]
    assert trained
    model.model(**inputs).logits.square().mean().backward()
    torch.optim.SGD(trained, lr=1.0).step()
    after = said(model, inputs)
    assert not torch.allclose(after, own, atol=1e-3)
    with model.running_as("original"):
        assert torch.equal(said(model, inputs), own)
    assert torch.equal(said(model, inputs), after)
    model.save(tmp_path / "adapter")
    again = VisionLanguageModel.load(str(tiny), adapter=str(tmp_path / "adapter"))
    assert torch.allclose(said(again, inputs), after, atol=1e-4)


def test_the_folder_of_a_user_is_not_touched_by_a_failure(tiny: Path, tmp_path: Path) -> None:
    folder = write_adapter(tiny, tmp_path / "adapter", "LORA", {**TEXT, "r": 4})
    edit(folder, lambda key: key.replace("layers", "blocks"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="does not fit"):
        VisionLanguageModel.load(str(tiny)).add_destination(str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
