"""Loading: fewer bits, several devices, half precision, a repository's own code, and prompts that are too long."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from conceptshift.concepts import SteeringVectors, _optional
from conceptshift.datamodules.sample import Batch, Sample
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import FeatureExtraction, FineTuning, VisionLanguageModel
from conceptshift.lightning_modules.backbone import Steering
from conceptshift.lightning_modules.backbone.loading import DeviceMap, quantization_config
from conceptshift.tests.adapters import TEXT, write_adapter
from conceptshift.tests.families.dynamic import ODD
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

Run = Callable[..., Any]
PACKED = {"4bit": torch.uint8, "8bit": torch.int8}


# --- fewer bits -------------------------------------------------------------------------------------------


@pytest.fixture(params=["4bit", "8bit"])
def bits(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip("bitsandbytes")
    return request.param


def test_linear_layers_are_packed_and_the_states_are_nearly_the_same(
    tiny: Path, bits: Any, shared_backbone: VisionLanguageModel, pictures: list[Image.Image]
) -> None:
    packed = VisionLanguageModel.load(str(tiny), quantization=bits)
    packed.self_check()
    dtypes = {
        name: module.weight.dtype for name, module in packed.model.named_modules() if isinstance(module, nn.Linear)
    }
    assert dtypes.pop("lm_head") == torch.float32
    assert set(dtypes.values()) == {PACKED[bits]}
    inputs = packed.encode(pictures, ["Describe the picture."] * 5, ["A star."] * 5)
    found, wanted = (
        one.read(inputs, one.sites(["lm.block.2"])).states["lm.block.2"] for one in (packed, shared_backbone)
    )
    kept = inputs["attention_mask"].bool()
    similar = torch.cosine_similarity(found[kept], wanted[kept], dim=-1)
    assert similar.mean() > {"4bit": 0.95, "8bit": 0.99}[bits]
    assert not torch.equal(found, wanted)
    assert len(packed.generate(inputs, 4).texts) == 5


def test_a_packed_model_is_extracted_and_steered(
    predict: Run, validate: Run, tmp_path: Path, bits: Any, vector: Tensor
) -> None:
    assert predict(tmp_path / "store", f"--model.quantization={bits}", "--data.limit=3").status == 0
    _, states = FeatureStore(tmp_path / "store").states("lm.block.1", "answer", "original")
    assert states.isfinite().all()
    SteeringVectors({"lm.block.1": vector}, {}, {}).save(tmp_path / "s.safetensors")
    steered = ("--trainer.callbacks+=Steerer", f'--trainer.callbacks.vectors=[{{"file": "{tmp_path}/s.safetensors"}}]')
    assert validate(f"--model.quantization={bits}", "--data.limit=2", *steered).status == 0


def test_lora_is_trained_beside_packed_weights(fit: Run, tiny: Path, tmp_path: Path, bits: Any) -> None:
    adapter = tmp_path / "adapter"
    export = ("--trainer.callbacks+=ModelExport", f"--trainer.callbacks.folder={adapter}")
    done = fit(f"--model.quantization={bits}", "--model.lora.rank=2", "--model.dtype=bfloat16", *export)
    assert done.status == 0, done.err
    moved = [value for name, value in load_file(adapter / "adapter_model.safetensors").items() if "lora_B" in name]
    assert all(value.isfinite().all() for value in moved)
    assert any(value.any() for value in moved)
    # An adapter of packed weights is used on whole ones, too.
    VisionLanguageModel.load(str(tiny), adapter=str(adapter), dtype="bfloat16")
    packed = VisionLanguageModel.load(str(tiny), adapter=str(adapter), dtype="bfloat16", quantization=bits)
    assert packed.weights_hash() == json.loads((adapter / "base_model.json").read_text())["weights_hash"]


def test_what_packed_weights_cannot_do(fit: Run, predict: Run, tiny: Path, tmp_path: Path) -> None:
    error = fit("--model.quantization=4bit").error
    assert "packed weights cannot be trained; train LoRA beside them with --model.init_args.lora.rank 16" in error
    error = predict(tmp_path / "store", "--model.quantization=8bit", f"--model.destination={tiny}").error
    assert (
        "is a whole model, of which no weights can be put into one that --model.init_args.quantization packs" in error
    )
    with pytest.raises(ValueError, match="random_weights trains from scratch"):
        FineTuning(str(tiny), random_weights=True, quantization="4bit")


def test_bitsandbytes_is_missing(predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_optional, "find_spec", lambda name: None)
    error = predict(tmp_path / "store", "--model.quantization=4bit").error
    assert 'bitsandbytes not found: pip install "conceptshift[bitsandbytes]"' in error


def test_four_bits_are_nf4_computed_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_optional, "find_spec", lambda name: name)
    config = quantization_config("4bit")
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert config.bnb_4bit_use_double_quant
    assert quantization_config("8bit").load_in_8bit


# --- several devices --------------------------------------------------------------------------------------


def spread_out(tiny: Path, folder: Path) -> VisionLanguageModel:
    spread = VisionLanguageModel.load(str(tiny))
    names = [f"model.language_model.{name}" for name in ("embed_tokens", "rotary_emb", "norm", "layers.0", "layers.2")]
    names += ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    places = {**dict.fromkeys(names, "cpu"), "model.language_model.layers.1": "disk"}
    dispatch_model(spread.model, places, main_device="cpu", offload_dir=str(folder))
    assert spread.model.model.language_model.layers[1].mlp.up_proj.weight.is_meta
    return spread


def test_blocks_that_lie_elsewhere_are_read_and_steered(
    tiny: Path, shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor, tmp_path: Path
) -> None:
    """A block's weights are on disk, and fetched by hooks that accelerate puts on every module."""
    spread = spread_out(tiny, tmp_path / "offloaded")
    steering = Steering("lm.block.1", vector, 2.0)
    outcomes = []
    for backbone in (spread, shared_backbone):
        inputs = backbone.encode(pictures, ["Describe the picture."] * 5)
        with backbone.intervene(steering):
            outcomes.append(backbone.generate(inputs, 4, backbone.sites(["lm.block.*", "lm.norm"])))
    assert outcomes[0].texts == outcomes[1].texts
    for site, states in outcomes[0].states.items():
        assert torch.equal(states, outcomes[1].states[site])
    spread.self_check()


def test_destinations_beside_blocks_that_lie_elsewhere(
    tiny: Path, pictures: list[Image.Image], tmp_path: Path, make_adapter: Run
) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter", scale=0.3)
    spread, whole = spread_out(tiny, tmp_path / "offloaded"), VisionLanguageModel.load(str(tiny))
    inputs = whole.encode(pictures[:2], ["What?", "Where?"])
    for model in (spread, whole):
        model.add_destination(str(adapter))
    for variant in ("original", "destination", "original"):
        with spread.running_as(variant), whole.running_as(variant):
            assert torch.equal(spread.logits(inputs), whole.logits(inputs)), variant
    with pytest.raises(ValueError, match="a part lies in main memory or on disk, where nothing can be exchanged"):
        spread_out(tiny, tmp_path / "once").add_destination(str(tiny))
    writing = make_adapter(tiny, tmp_path / "pissa", 0.3, init_lora_weights="pissa", target_modules=r".*1.*q_proj")
    with pytest.raises(ValueError, match="LORA writes into the original with these options"):
        spread_out(tiny, tmp_path / "again").add_destination(str(writing))


def test_a_model_that_was_laid_out_is_not_moved(tiny: Path) -> None:
    places: list[tuple[DeviceMap | None, torch.dtype]] = [("auto", torch.float32), (None, torch.float64)]
    for device_map, dtype in places:
        module = FeatureExtraction(str(tiny), ["lm.block.0"], ["answer"], device_map=device_map)
        module.configure_model()
        module.to(torch.float64)
        assert module.backbone.model.dtype == dtype


def test_device_map_gives_the_same_states(predict: Run, tmp_path: Path) -> None:
    for name, more in (("spread", ["--model.device_map=auto"]), ("plain", [])):
        assert predict(tmp_path / name, "--data.limit=3", *more).status == 0
    states = [FeatureStore(tmp_path / name).states("lm.block.1", "answer", "original") for name in ("spread", "plain")]
    assert states[0][0] == states[1][0]
    assert torch.equal(states[0][1], states[1][1])


def test_device_map_needs_a_single_process(tiny: Path) -> None:
    module = FeatureExtraction(str(tiny), ["lm.block.0"], ["answer"], device_map="auto")
    module._trainer = SimpleNamespace(world_size=2, strategy=None)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"one process only: add --trainer\.devices 1"):
        module.configure_model()


# --- half precision ---------------------------------------------------------------------------------------


def test_bfloat16_from_training_to_steering(
    fit: Run, predict: Run, validate: Run, tmp_path: Path, vector: Tensor
) -> None:
    half, adapter = "--model.dtype=bfloat16", tmp_path / "adapter"
    export = ("--trainer.callbacks+=ModelExport", f"--trainer.callbacks.folder={adapter}")
    assert fit(half, "--model.lora.rank=2", *export).status == 0
    assert predict(tmp_path / "store", half, f"--model.destination={adapter}", "--data.limit=4").status == 0
    with FeatureStore(tmp_path / "store").open_shard("rank-00000/000000.safetensors") as shard:
        assert shard.get_tensor("lm.block.1").dtype == torch.bfloat16
    for variant in ("original", "destination"):
        _, states = FeatureStore(tmp_path / "store").states("lm.block.1", "answer", variant)
        assert states.isfinite().all()
    SteeringVectors({"lm.block.1": vector}, {}, {}).save(tmp_path / "s.safetensors")
    steered = ("--trainer.callbacks+=Steerer", f'--trainer.callbacks.vectors=[{{"file": "{tmp_path}/s.safetensors"}}]')
    assert validate(half, "--data.limit=2", *steered).status == 0


# --- files that lack something, and files that are packed -------------------------------------------------


def without(model: Path, folder: Path, *endings: str) -> Path:
    """A copy of a model whose weights lack some tensors."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.endswith(endings)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("ending", ["lm_head.weight", "embed_tokens.weight", "1.mlp.up_proj.weight", "linear_2.bias"])
def test_a_tensor_that_lacks_is_not_made_up(ending: str, tiny: Path, tmp_path: Path, predict: Run) -> None:
    folder = without(tiny, tmp_path / "less", ending)
    with pytest.raises(ValueError, match=rf"its files have no [\w.]*{ending}, which would be random"):
        VisionLanguageModel.load(str(folder))
    error = predict(tmp_path / "store", model=folder).error
    assert "--model.init_args.allow_missing_weights true" in error
    with pytest.raises(ValueError, match=rf"destination .* its files have no [\w.]*{ending}|its files have no"):
        VisionLanguageModel.load(str(tiny)).add_destination(str(folder))
    assert not (tmp_path / "store").exists()


def test_several_tensors_that_lack_are_counted(tiny: Path, tmp_path: Path) -> None:
    folder = without(tiny, tmp_path / "less", "up_proj.weight")
    with pytest.raises(ValueError, match=r"up_proj\.weight and 2 others, which would be random"):
        VisionLanguageModel.load(str(folder))


def test_who_means_it_gets_random_tensors_and_another_hash(tiny: Path, tmp_path: Path, predict: Run) -> None:
    """The files do not tell what the model is, so its tensors do."""
    folder = without(tiny, tmp_path / "less", "lm_head.weight")
    done = predict(tmp_path / "store", "--model.allow_missing_weights=true", "--data.limit=2", model=folder)
    assert done.status == 0, done.err
    assert FeatureStore(tmp_path / "store").metadata["weights_hash"].startswith("tensors:")


def test_a_model_with_an_adapter_is_no_original(tiny: Path, tmp_path: Path, make_adapter: Run) -> None:
    """Transformers loads both, and what is in the files of the model would not be what speaks."""
    both = Path(shutil.copytree(tiny, tmp_path / "both"))
    adapter = make_adapter(tiny, tmp_path / "adapter", scale=0.2)
    for file in adapter.iterdir():
        shutil.copy(file, both)
    for folder in (both, adapter):
        with pytest.raises(ValueError, match=r"it has a PEFT adapter .* in place of the original; give the model that"):
            VisionLanguageModel.load(str(folder))
    with pytest.raises(ValueError, match="both a PEFT adapter and a model; remove the one that is not meant"):
        VisionLanguageModel.load(str(tiny)).add_destination(str(both))


def test_a_destination_in_another_format(tiny: Path, tmp_path: Path) -> None:
    """Weights in a file of torch's, which is read without running what is pickled in it."""
    model = VisionLanguageModel.load(str(tiny))
    folder = Path(shutil.copytree(tiny, tmp_path / "other"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = next(name for name in weights if name.endswith("lm_head.weight"))
    torch.save({**weights, name: weights[name] * 1.5}, folder / "pytorch_model.bin")
    model.add_destination(str(folder))
    with model.running_as("destination"):
        assert torch.equal(model.unembed.weight, weights[name] * 1.5)


def packed_as(model: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(model, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": config}))
    return folder


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "aqlm", "hqq", "bitnet"])
def test_weights_that_cannot_be_unpacked_here_are_refused_by_method(
    method: str, tiny: Path, tmp_path: Path, predict: Run
) -> None:
    """With the package that they need this may run; without it, it is said which."""
    folder = packed_as(tiny, tmp_path / "packed", quant_method=method, bits=4, group_size=32)
    error = predict(tmp_path / "store", model=folder).error
    assert method.replace("-", "").lower() in error.replace("-", "").lower(), error
    assert not (tmp_path / "store").exists()


def test_rows_that_end_within_a_block(make_model: Run, pictures: list[Image.Image]) -> None:
    """Four bits of a layer whose width is no multiple of the 64 weights of a block, against its weights unpacked."""
    functional = pytest.importorskip("bitsandbytes.functional")
    packed = VisionLanguageModel.load(str(make_model(text_width=96)), quantization="4bit")
    inputs = packed.encode(pictures[:2], ["What?", "Where?"], ["a", "b"])
    site = "lm.block.0"
    found = packed.read(inputs, packed.sites([site])).states[site]
    plain = VisionLanguageModel.load(packed.source)
    layers = {name: layer for name, layer in packed.model.named_modules() if type(layer).__name__ == "Linear4bit"}
    assert any(layer.in_features % 64 for layer in layers.values())
    with torch.no_grad():
        for name, layer in layers.items():
            weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.model.get_submodule(name).weight.copy_(weight.float())
    expected = plain.read(inputs, plain.sites([site])).states[site]
    assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.999


@pytest.mark.parametrize("kind", ["LORA", "IA3"])
def test_packed_weights_are_the_same_beside_an_adapter(
    kind: str, tiny: Path, tmp_path: Path, pictures: list[Image.Image], bits: Any
) -> None:
    """Also behind a pass, and after they were saved."""
    options = {**TEXT, "r": 4} if kind == "LORA" else {"target_modules": r".*k_proj", "feedforward_modules": []}
    folder = write_adapter(tiny, tmp_path / "adapter", kind, options)
    model = VisionLanguageModel.load(str(tiny), quantization=bits)
    inputs = model.encode(pictures[:1], ["What?"])
    own, sums = model.logits(inputs), model._original.checksums()
    model.save(tmp_path / "saved")
    model.add_destination(str(folder))
    assert torch.equal(model.logits(inputs), own)
    assert model._original.checksums() == sums
    with model.running_as("destination"):
        theirs = model.logits(inputs)
    fresh = VisionLanguageModel.load(str(tiny), quantization=bits)
    alone = PeftModel.from_pretrained(fresh.model, folder)
    with torch.no_grad():
        assert torch.equal(theirs, alone(**inputs).logits)
    again = VisionLanguageModel.load(str(tmp_path / "saved"))
    assert torch.equal(again.logits(inputs), own)


def test_a_packed_unembedding_is_refused(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["nothing"])
    model: Any = AutoModelForImageTextToText.from_pretrained(tiny, quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    VisionLanguageModel.load(str(tiny)).processor.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="its unembedding is quantised"):
        VisionLanguageModel.load(str(tmp_path / "packed"))


def test_a_model_that_was_saved_packed_is_the_packed_one(
    tiny: Path, tmp_path: Path, pictures: list[Image.Image], bits: Any
) -> None:
    packed = VisionLanguageModel.load(str(tiny), quantization=bits)
    packed.save(tmp_path / "packed")
    again = VisionLanguageModel.load(str(tmp_path / "packed"))
    inputs = packed.encode(pictures[:2], ["What?", "Where?"], ["a", "b"])
    assert torch.equal(again.logits(inputs), packed.logits(inputs))
    with pytest.raises(ValueError, match="an original that is quantised; give an adapter"):
        again.add_destination(str(tiny))


# --- a repository's own code ------------------------------------------------------------------------------

_CODE = """
from pathlib import Path
from transformers import LlavaConfig, LlavaForConditionalGeneration

(Path(__file__).parent / "ran").touch()
Path({ran!r}).touch()

class OwnConfig(LlavaConfig):
    model_type = "own_llava"

class OwnModel(LlavaForConditionalGeneration):
    config_class = OwnConfig
"""


@pytest.fixture
def repository(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that transformers does not know, with its code, which leaves a file `ran` when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = Path(shutil.copytree(tiny, tmp_path / "own"))
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own_llava", "auto_map": code}))
    # Its weights under its own names: transformers has no translation for a model that it does not know.
    save_file(VisionLanguageModel.load(str(tiny)).model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "own.py").write_text(_CODE.format(ran=str(tmp_path / "ran")))
    return folder


def test_a_repository_s_code_is_run_only_where_it_is_trusted(repository: Path, predict: Run, tmp_path: Path) -> None:
    error = predict(tmp_path / "store", model=repository).error
    assert "the Python code in its repository is not run; choose another model, or read that code and give" in error
    assert "--model.init_args.trust_remote_code true" in error
    assert not (tmp_path / "ran").exists()
    done = predict(tmp_path / "store", "--model.trust_remote_code=true", "--data.limit=2", model=repository)
    assert done.status == 0, done.err
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123abc"])
def test_trust_is_in_a_commit(revision: str | None) -> None:
    with pytest.raises(ValueError, match=r"give the commit that was read with --model\.init_args\.revision"):
        VisionLanguageModel.load("someone/something", revision=revision, trust_remote_code=True)


# --- prompts too long -------------------------------------------------------------------------------------


def with_context(model: Path, folder: Path, positions: int) -> Path:
    """A copy of a model that reads so many positions, with a tokenizer that was saved to cut at 20 tokens."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = positions
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 20, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "truncation": cut}))
    return folder


def test_nothing_is_cut_off(
    tiny: Path, tmp_path: Path, shared_backbone: VisionLanguageModel, pictures: list[Image.Image]
) -> None:
    given = pictures[:1], ["word " * 200], ["A star."]
    found = VisionLanguageModel.load(str(with_context(tiny, tmp_path / "cut", 512))).encode(*given)
    wanted = shared_backbone.encode(*given)
    assert wanted["input_ids"].shape[1] > 250
    assert torch.equal(found["input_ids"], wanted["input_ids"])


def test_a_sample_longer_than_the_context_is_refused(tiny: Path, predict: Run, fit: Run, tmp_path: Path) -> None:
    model = with_context(tiny, tmp_path / "short", 70)
    error = predict(tmp_path / "store", "--data.limit=4", "--data.batch_size=4", model=model).error
    assert error.startswith("conceptshift: sample '")
    assert f"of which image tokens 64), but {model} reads 70, and nothing is cut off; shorten the prompt" in error
    assert "nothing is cut off" in fit(f"--model.model_id={model}").error
    assert not list((tmp_path / "store").glob("rank-*/*"))
    needed = int(error.split("takes ")[1].split()[0])
    for context, status in ((needed - 1, 2), (needed, 0)):
        model = with_context(tiny, tmp_path / f"model-{context}", context)
        assert predict(tmp_path / f"{context}", "--data.limit=4", "--data.batch_size=4", model=model).status == status


# --- what cannot be loaded is told in one line ------------------------------------------------------------


def test_a_precision_that_there_is_not(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"--model\.init_args\.dtype: expected one of auto, .*, got 'bf16'"):
        FineTuning(str(tiny), dtype="bf16")


def test_a_package_that_is_missing_is_named(tiny: Path, cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ImportError("\nLoading this needs `brackets`\nand more")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", fail)
        assert "(Loading this needs `brackets` and more)" in cli("sites", "--model", tiny).error
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", fail)
    error = cli("sites", "--model", tiny).error
    assert "its processor needs a package that is missing (Loading this needs `brackets` and more)" in error
    assert "no image-text-to-text model" not in error


def test_an_encoder_of_its_own_has_a_limit_too() -> None:
    backbone = VisionLanguageModel(*ODD["florence2"](), "florence2")
    module = FeatureExtraction("florence2", ["lm.block.1"], ["answer"], max_new_tokens=4)
    module._backbone = backbone
    module._trainer = SimpleNamespace(training=False)  # type: ignore[assignment]
    limit = backbone.model.config.text_config.max_position_embeddings
    assert module.context_length == limit
    picture, sample = Image.new("RGB", (64, 64)), Sample("the long one", Path(), "", "")
    module.check_lengths(Batch([sample], backbone.encode([picture], ["What is it?"], ["a"])))
    inputs = backbone.encode([picture], ["word " * limit], ["a"])
    with pytest.raises(ValueError, match=rf"'the long one' takes \d+ positions .* but florence2 reads {limit}"):
        module.check_lengths(Batch([sample], inputs))
