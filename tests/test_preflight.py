"""`--preflight`: its figures are those of real models, caches and stores, and what cannot fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.cli import preflight
from conceptshift.lightning_modules import FeatureExtraction, FineTuning, VisionLanguageModel
from conceptshift.lightning_modules.backbone.loading import load_skeleton
from conceptshift.lightning_modules.finetuning import LoraOptions
from PIL import Image
from torch import nn

Run = Callable[..., Any]
GIB = 2**30


def total(model: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in model.parameters())


def bare(model: Path, dtype: str = "auto") -> VisionLanguageModel:
    """The model on the meta device."""
    return VisionLanguageModel(
        *load_skeleton(str(model), revision=None, dtype=dtype, attention="sdpa"), source=str(model)
    )


def figures(out: str) -> dict[str, float]:
    """Name → GiB of each line of the table."""
    rows = [line.strip().partition(" GiB  ") for line in out.splitlines() if " GiB  " in line]
    return {name.partition(":")[0]: float(size) for size, _, name in rows}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines say more than three decimals of a GiB."""
    monkeypatch.setattr(preflight, "_line", lambda name, size: f"{size / GIB:10.9f} GiB  {name}")


# --- weights and what training adds -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_weights_are_those_of_the_loaded_model(tiny: Path, dtype: str) -> None:
    found = preflight.weight_bytes(bare(tiny, dtype).model, None)
    assert sum(found.values()) == total(VisionLanguageModel.load(str(tiny), dtype=dtype))


def test_weights_that_are_tied_count_once(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "tied"))
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    VisionLanguageModel.load(str(folder), random_weights=True).save(folder)
    found, apart = (sum(preflight.weight_bytes(bare(model).model, None).values()) for model in (folder, tiny))
    loaded = VisionLanguageModel.load(str(folder))
    assert found == total(loaded)
    assert found == apart - loaded.structure.head.weight.numel() * 4


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_packed_weights_are_those_of_the_loaded_model(tiny: Path, bits: Any) -> None:
    pytest.importorskip("bitsandbytes")
    packed = VisionLanguageModel.load(str(tiny), dtype="bfloat16", quantization=bits)
    beside = 0
    for parameter in packed.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            kept = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            beside += sum(one.numel() * one.element_size() for one in kept)
        if (scales := getattr(parameter, "SCB", None)) is not None:
            beside += scales.numel() * scales.element_size()
    found = preflight.weight_bytes(bare(tiny, "bfloat16").model, bits)
    assert sum(found.values()) == total(packed) + beside


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [(torch.optim.AdamW, 2), (torch.optim.SGD, 0), (lambda given: torch.optim.SGD(given, momentum=0.9), 1)],
)
@pytest.mark.parametrize("lora", [LoraOptions(rank=4), None])
def test_optimizer_states_are_those_of_its_class(tiny: Path, optimizer: Any, states: int, lora: Any) -> None:
    module = FineTuning(str(tiny), lora=lora, dtype="bfloat16", optimizer=optimizer)
    backbone = bare(tiny, "bfloat16")
    with torch.device("meta"):
        module.choose_trainable(backbone)
    trained = [one for one in backbone.parameters() if one.requires_grad]
    real = [one for one in module.load().parameters() if one.requires_grad]
    assert [(one.shape, one.dtype) for one in trained] == [(one.shape, one.dtype) for one in real]
    assert preflight.optimizer_bytes(module, trained) == states * sum(one.numel() * one.element_size() for one in real)


# --- the cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [2, 1])
def test_the_cache_is_a_real_one(tiny: Path, tmp_path: Path, pictures: list[Image.Image], heads: int) -> None:
    """With as many heads of keys and values as of queries, and with fewer."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_key_value_heads"] = heads
    (folder / "config.json").write_text(json.dumps(config))
    backbone = VisionLanguageModel.load(str(folder), random_weights=True)
    inputs = backbone.encode(pictures, ["Describe the picture."] * 5)
    output = backbone.model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True
    )
    layers = output.past_key_values.layers
    real = sum(one.numel() * one.element_size() for layer in layers for one in (layer.keys, layer.values))
    columns = inputs["input_ids"].shape[1] + 6 - 1
    assert preflight.cache_bytes(backbone.model.config, 5, columns, torch.float32) == real


# --- the disk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selectors", "dtype", "within"),
    [("[image,last_prompt]", "auto", 0.03), ("[image]", "bfloat16", 0.05), ("[prompt,'0','2:5']", "auto", 0.03)],
)
@pytest.mark.usefixtures("exact")
def test_features_take_what_they_were_said_to_take(
    predict: Run, make_adapter: Run, tiny: Path, tmp_path: Path, selectors: str, dtype: str, within: float
) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter", scale=0.1)
    more = [f"--model.selectors={selectors}", f"--model.destination={adapter}", f"--model.dtype={dtype}"]
    more += ["--model.sites=['lm.block.*','lm.norm']"]
    store = tmp_path / "store"
    said = predict(store, *more, "--preflight")
    assert said.status == 0, said.err
    assert not store.exists()
    assert predict(store, *more).status == 0
    real = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    assert figures(said.out)[f"disk at most in {store}"] * GIB == pytest.approx(real, rel=within)


@pytest.mark.parametrize("selector", "answer answer_mean generated text all token_of_interest:star -1 70: 2:5".split())
def test_no_selector_picks_more_than_it_was_said_to(
    tiny: Path, backbone: VisionLanguageModel, pictures: list[Image.Image], selector: str
) -> None:
    inputs = backbone.encode(pictures, ["Describe the picture."] * 5)
    generation = backbone.generate(inputs, 6, backbone.sites(["lm.block.0"]))
    module = FeatureExtraction(str(tiny), ["lm.block.0"], [selector], max_new_tokens=6)
    lengths = preflight.Lengths(inputs["input_ids"].shape[1], 64, 6)
    most = preflight._positions(module.selectors[0], module, lengths)
    rows = generation.select(module.selectors[0], backbone.vocabulary)
    assert max((rows.samples.count(sample) for sample in range(5)), default=0) <= most


# --- the verdict ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("exact")
def test_what_fits_is_told_and_not_run(predict: Run, fit: Run, validate: Run, tiny: Path, tmp_path: Path) -> None:
    weights = total(VisionLanguageModel.load(str(tiny)))
    for done in (predict(tmp_path / "store", "--preflight"), validate("--preflight"), fit("--preflight")):
        assert done.status == 0, done.err
        assert figures(done.out)["weights"] * GIB == pytest.approx(weights)
    assert not (tmp_path / "store").exists()
    whole, lora = (figures(fit("--preflight", *more).out) for more in ([], ["--model.lora.rank=2"]))
    assert whole["gradients"] * GIB == pytest.approx(weights)
    assert whole["optimizer states"] * GIB == pytest.approx(2 * weights)
    assert lora["gradients"] < whole["gradients"] / 20
    assert lora["weights"] > whole["weights"]


def test_what_cannot_fit_is_refused(predict: Run, fit: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "get_max_memory", lambda: {"cpu": 1_000_000})
    error = predict(tmp_path / "store", "--preflight").error
    assert "--preflight: a process needs more memory than is free" in error
    monkeypatch.setattr(preflight, "_PROGRAM", 0)
    assert "lower --data.init_args.batch_size" in fit("--preflight", "--data.batch_size=1000").error
    monkeypatch.setattr(preflight, "_activations", lambda *given: 0)
    assert "most of it for optimizer states; train LoRA" in fit("--preflight").error
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "free_disk", lambda folder: 1000)
    error = predict(tmp_path / "store", "--preflight").error
    assert f"{tmp_path / 'store'}: features can need more than is free; read at fewer --model.init_args.sites" in error


def test_nothing_is_read_of_the_weights(predict: Run, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    assert predict(tmp_path / "store", "--preflight", model=folder).status == 0


@pytest.mark.parametrize("pieces", [2, 4])
def test_pieces_are_as_large_as_those_of_a_process(tiny: Path, pieces: int) -> None:
    """All but its own share of the blocks is there, and two whole blocks at a time."""
    backbone = bare(tiny)
    weights = preflight.weight_bytes(backbone.model, None)
    blocks = [*backbone.structure.image_blocks, *backbone.structure.blocks]
    inside = [total(block) for block in blocks]
    wanted = sum(weights.values()) - sum(inside) + sum(inside) / pieces + 2 * max(inside)
    assert preflight._held(backbone, weights, pieces) == pytest.approx(wanted, abs=1)
    assert preflight._held(backbone, weights, 1) == sum(weights.values())
