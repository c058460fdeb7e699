"""What is read is known by its content: models, adapters, data, dictionaries; a stranger is refused, and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.concepts import KMeans, SteeringVectors
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import FeatureExtraction, VisionLanguageModel
from conceptshift.lightning_modules.backbone.destinations import name_destinations
from conceptshift.lightning_modules.backbone.identity import adapter_hash, model_hashes
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

Run = Callable[..., Any]
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
TARGETS = ["q_proj", "v_proj"]
ADAPTERS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: LoraConfig(r=4, target_modules=TARGETS),
    "IA3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "LoHa": lambda: LoHaConfig(r=4, target_modules=TARGETS),
    "LoKr": lambda: LoKrConfig(r=4, target_modules=TARGETS),
    "OFT": lambda: OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS),
    "VeRA": lambda: VeraConfig(r=4, target_modules=["o_proj"]),
    "AdaLoRA": lambda: AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=TARGETS),
    "LN tuning": lambda: LNTuningConfig(target_modules=["input_layernorm"]),
    "trainable tokens": lambda: TrainableTokensConfig(token_indices=[5, 6], target_modules=["embed_tokens"]),
}


def save_peft(model: Path, folder: Path, config: Any, seed: int = 0) -> Path:
    """An adapter as PEFT alone saves it, with values that do something."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(VisionLanguageModel.load(str(model)).model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(str(folder))
    return folder


def change_a_row(model: Path) -> None:
    """Change one row of the token embeddings, as a fine-tuning of tokens does."""
    path = model / "model.safetensors"
    weights = load_file(path)
    (name,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    weights[name][300] += 1
    save_file(weights, path, {"format": "pt"})


# --- hashes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_original_is_the_same_whatever_adapter_is_beside_it(tiny: Path, tmp_path: Path, kind: str) -> None:
    alone = VisionLanguageModel.load(str(tiny))
    in_memory = VisionLanguageModel(alone.model, alone.processor, "in memory")
    before = in_memory.weights_hash()
    adapter = save_peft(tiny, tmp_path / "adapter", ADAPTERS[kind]())
    loaded = VisionLanguageModel.load(str(tiny))
    loaded.add_destination(str(adapter))
    assert loaded.weights_hash() == alone.weights_hash() == model_hashes(str(tiny), None)["weights_hash"]
    in_memory.add_destination(str(adapter))
    assert in_memory.weights_hash() == before != loaded.weights_hash()
    assert loaded.destination_hash("destination") == adapter_hash(str(adapter))


def test_all_of_the_weights_count(tiny: Path, tmp_path: Path) -> None:
    same, changed = (Path(shutil.copytree(tiny, tmp_path / name)) for name in ("same", "changed"))
    change_a_row(changed)
    hashes = [model_hashes(str(path), None) for path in (tiny, same, changed)]
    assert hashes[0] == hashes[1]
    assert hashes[0]["weights_hash"] != hashes[2]["weights_hash"]
    assert hashes[0]["settings_hash"] == hashes[2]["settings_hash"]
    # Of models without files, too.
    found = [VisionLanguageModel.load(str(path)) for path in (tiny, same, changed)]
    tensors = [VisionLanguageModel(one.model, one.processor, "").weights_hash() for one in found]
    assert tensors[0] == tensors[1] != tensors[2]


def test_settings_count_and_other_files_do_not(tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    before = model_hashes(str(model), None)
    (model / "README.md").write_text("A card.")
    (model / "trainer_state.json").write_text("{}")
    assert model_hashes(str(model), None) == before
    template = model / "chat_template.jinja"
    assert template.is_file()
    template.write_text(template.read_text() + " ")
    assert model_hashes(str(model), None)["settings_hash"] != before["settings_hash"]
    assert model_hashes(str(tmp_path / "nothing"), None) == {}


def test_weights_and_configuration_of_an_adapter_count(tiny: Path, tmp_path: Path) -> None:
    adapter = save_peft(tiny, tmp_path / "adapter", ADAPTERS["LoRA"]())
    before = adapter_hash(str(adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, counts in (
        ({"base_model_name_or_path": "elsewhere"}, False),
        ({"target_modules": config["target_modules"][::-1]}, False),
        ({"lora_alpha": 99}, True),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
        assert (adapter_hash(str(adapter)) != before) is counts, change
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(adapter / "adapter_model.safetensors")
    list(weights.values())[-1].view(-1)[-1] += 1
    save_file(weights, adapter / "adapter_model.safetensors")
    assert adapter_hash(str(adapter)) != before


# --- what changes between two halves ------------------------------------------------------------------------


class Stopped(Exception):
    """The power went out."""


@pytest.fixture
def halves(cli: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Extract, stopped after the second of three batches, then change something, and start again."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))

    def run(change: Callable[[Path], object], *data: object, more: Sequence[object] = ()) -> Any:
        given = [
            "predict", *QUIET, *data, "--model=FeatureExtraction", f"--model.model_id={model}",
            "--model.sites=[lm.block.1]", "--model.selectors=[last_prompt]", "--model.max_new_tokens=2",
            "--data.batch_size=4", "--out=run", "--callbacks.features=FeatureWriter",
            "--callbacks.features.shard_rows=1", *more,
        ]  # fmt: skip
        step = FeatureExtraction.predict_step

        def predict_step(self: Any, batch: Any, number: int) -> Any:
            if number == 2:
                raise Stopped
            return step(self, batch, number)

        with monkeypatch.context() as patch:
            patch.setattr(FeatureExtraction, "predict_step", predict_step)
            with pytest.raises(Stopped):
                cli(*given)
        change(model)
        return cli(*given)

    return run


@pytest.fixture
def questions(shapes: Path, tmp_path: Path) -> Path:
    """Twelve pictures with a question each, in a folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number, picture in enumerate(sorted((shapes / "train2014").iterdir())[:12]):
        shutil.copy(picture, folder / f"{number:02d}.jpg")
        rows.append({"file_name": f"{number:02d}.jpg", "question": f"What is in picture {number}?"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def asked(folder: Path) -> list[object]:
    return ["--data=FolderDataModule", f"--data.root={folder}", "--data.question=question"]


def test_nothing_has_changed(halves: Run, questions: Path) -> None:
    done = halves(lambda model: None, *asked(questions))
    assert done.status == 0, done.err
    assert len(FeatureStore("run/features").samples("original")) == 12


def test_questions_that_were_corrected(halves: Run, questions: Path) -> None:
    path = questions / "metadata.jsonl"
    done = halves(
        lambda model: path.write_text(path.read_text().replace("What is", "Which things are")), *asked(questions)
    )
    assert "run/features: holds the features of another run (`data.hash` was '" in done.error
    assert not Path("run/features/states.parquet").exists()


def test_a_picture_that_was_exchanged(halves: Run, questions: Path) -> None:
    done = halves(lambda model: shutil.copy(questions / "00.jpg", questions / "11.jpg"), *asked(questions))
    assert "holds the features of another run (`data.hash` was '" in done.error


def test_a_model_that_was_exchanged_in_its_folder(halves: Run, questions: Path) -> None:
    done = halves(change_a_row, *asked(questions))
    assert "holds the features of another run (`weights_hash` was 'files:" in done.error


def test_an_adapter_whose_alpha_was_changed(
    halves: Run, questions: Path, tiny: Path, make_adapter: Run, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter", 1.0, lora_alpha=4)

    def change(model: Path) -> None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))

    done = halves(change, *asked(questions), more=[f"--model.destination={adapter}"])
    assert "holds the features of another run (`checkpoint_hashes.destination` was '" in done.error


def test_a_dictionary_that_was_learned_again(halves: Run, questions: Path, tmp_path: Path) -> None:
    """It says which samples a conditional steering steers."""
    metadata = {"site": "lm.block.1", "selector": "last_prompt", "variant": "original"}
    torch.manual_seed(0)
    folder, Z = tmp_path / "dictionary", torch.randn(30, 64)
    KMeans(3, seed=0).fit(Z).save(folder / "dictionary.safetensors", metadata)
    file = tmp_path / "vector.safetensors"
    SteeringVectors({"lm.block.1": torch.randn(64)}, {}, {}).save(file)
    step = [{"file": str(file), "dictionary": str(folder), "concept": 1}]
    steered = ["--callbacks.steer=Steerer", f"--callbacks.steer.vectors={json.dumps(step)}"]
    again = KMeans(3, seed=1).fit(Z + 1)
    done = halves(
        lambda model: again.save(folder / "dictionary.safetensors", metadata), *asked(questions), more=steered
    )
    assert "holds the features of another run (`steering.0.content_hash` was '" in done.error


# --- readers of results -------------------------------------------------------------------------------------


@pytest.fixture
def captions(validate: Run) -> Run:
    """Caption and score into the folder of a run: `captions(out, *more)`."""

    def run(out: object, *more: object) -> Any:
        return validate("--callbacks.captions=CaptionScorer", f"--out={out}", *more)

    return run


def test_a_baseline_by_a_stranger_is_refused(
    captions: Run, tiny: Path, make_adapter: Run, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """As when the captions of the adapter have come into the place of the original's."""
    file = tmp_path / "vector.safetensors"
    SteeringVectors({"lm.block.1": torch.randn(64)}, {}, {}).save(file)
    adapter = make_adapter(tiny, tmp_path / "adapter", 1.0)
    steered = ("--callbacks.steer=Steerer", f'--callbacks.steer.vectors=[{{"file": "{file}"}}]')
    adapted, other = f"--model.adapter={adapter}", f"--model.model_id={make_model(seed=8)}"
    baseline = "--callbacks.captions.baseline=before/captions.json"
    for made, used, told in (
        ((adapted,), steered, f"`destination_hash` was '{adapter_hash(str(adapter))}', and is None"),
        (steered, (adapted,), "`steering` was [{"),
        ((other,), (), "`weights_hash` was 'files:"),
        (("--model.max_new_tokens=3",), (), "`max_new_tokens` was 3, and is 5"),
        (("--trainer.precision=bf16-true",), (), "`precision` was 'bf16-true', and is '32-true'"),
        (("--data.prompt=What?",), (), "had another prompt or picture than in this run"),
        ((), steered, ""),
        ((), (adapted,), ""),
        ((adapted,), (adapted, *steered), ""),
    ):
        assert captions("before", *made).status == 0
        done = captions("after", baseline, *used)
        if told:
            assert "before/captions.json" in done.error
            assert told in done.error, (made, used)
        else:
            assert done.status == 0, done.err


def test_a_result_tells_what_made_it(
    captions: Run, tiny: Path, make_adapter: Run, shapes: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter", 1.0)
    done = captions("run", f"--model.adapter={adapter}", "--data.limit=2", "--seed_everything=7")
    assert done.status == 0, done.err
    content = json.loads(Path("run/captions.json").read_text())
    made = content["provenance"]
    assert content["coverage"] == "2 of 3 (limit)"
    assert made["model_id"] == str(tiny)
    assert made["weights_hash"] == model_hashes(str(tiny), None)["weights_hash"]
    assert made["adapter_hash"] == made["destination_hash"] == adapter_hash(str(adapter))
    assert (made["seed"], made["max_new_tokens"], made["limits"], made["steering"]) == (7, 5, {}, [])
    data = made["data"]
    assert (data["split"], data["limit"], data["samples"], data["of"]) == ("val", 2, 2, 3)
    assert data["prompt"].startswith("Provide a one-sentence caption")
    assert made["command"].startswith("conceptshift validate --trainer.accelerator=cpu")
    assert made["versions"]["torch"] == torch.__version__
    assert captions("run", "--trainer.limit_val_batches=1", "--data.batch_size=1").status == 0
    content = json.loads(Path("run-trial/captions.json").read_text())
    assert content["coverage"] == "1 of 3 (limit_val_batches)"
    assert content["provenance"]["limits"] == {"limit_val_batches": 1}


def test_results_of_another_dictionary_are_refused_by_the_report(cli: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "concepts" / "mine"
    folder.mkdir(parents=True)
    (folder / "concepts.json").write_text(json.dumps({"words": [["a"]], "dictionary_hash": "one"}))
    (folder / "causal.json").write_text(json.dumps({"concepts": [], "left_out": [], "dictionary_hash": "two"}))
    error = cli("report", "--folder", tmp_path / "run").error
    assert f"{folder / 'causal.json'}: of another dictionary (two) than {folder / 'concepts.json'} (one)" in error
    shutil.rmtree(tmp_path / "run")
    folder = tmp_path / "run"
    folder.mkdir()
    for variant, weights in (("original", "w"), ("steered", "v")):
        content = {"predictions": {}, "provenance": {"weights_hash": weights}}
        (folder / f"captions-{variant}.json").write_text(json.dumps(content))
    (folder / "results.json").write_text("{}")
    error = cli("report", "--folder", folder).error
    assert f"{folder / 'captions-steered.json'}: cannot stand beside {folder / 'captions-original.json'}" in error
    assert "`weights_hash` was 'w', and is 'v'" in error


def test_pairs_are_of_the_same_picture_and_prompt(
    cli: Run, predict: Run, tiny: Path, shapes: Path, tmp_path: Path
) -> None:
    """Of two models that were extracted on their own; the samples have the same ids whatever was asked."""
    for name, more in (("a", ()), ("b", ("--data.prompt=What?",))):
        options = {
            "site": "lm.block.1", "selector": "answer_mean", "dictionary": "KMeans", "dictionary.n_concepts": 2,
            "out": tmp_path / f"{name}-concepts",
        }  # fmt: skip
        given = [f"--callbacks.fit.{key}={value}" for key, value in options.items()]
        fitter = ["--callbacks.fit=DictionaryFitter", *given]
        done = predict(tmp_path / name, "--data.limit=12", *fitter, *more, selector="answer_mean")
        assert done.status == 0, done.err
    meter = {
        "original": tmp_path / "a-concepts", "destination": tmp_path / "b-concepts", "out": tmp_path / "shift",
        "destination_features": tmp_path / "b",
    }  # fmt: skip
    error = cli(
        "predict", *QUIET, "--model=Replay", "--data=StoredFeatures", f"--data.folder={tmp_path / 'a'}",
        "--trainer.callbacks+=ShiftMeter", *(f"--trainer.callbacks.{key}={value}" for key, value in meter.items()),
    ).error  # fmt: skip
    assert f"{tmp_path / 'a'} and {tmp_path / 'b'}: sample '" in error
    assert "was asked 'Provide a one-sentence caption for the provided image.' and 'What?'" in error


def test_a_series_of_two_trainings_is_refused(tiny: Path, make_adapter: Run, tmp_path: Path) -> None:
    for step, run in ((10, "one"), (20, "one"), (30, "other")):
        folder = make_adapter(tiny, tmp_path / "series" / f"step-{step:06d}", 1.0)
        note = json.loads((folder / "base_model.json").read_text())
        (folder / "base_model.json").write_text(json.dumps({**note, "run": run}))
    with pytest.raises(ValueError, match=r"step-000010 is of one training \(one\), step-000030 of another \(other\)"):
        name_destinations(str(tmp_path / "series"))
    shutil.rmtree(tmp_path / "series" / "step-000030")
    assert list(name_destinations(str(tmp_path / "series"))) == ["step-000010", "step-000020"]


def test_a_destination_of_another_base_is_refused(tiny: Path, make_adapter: Run, tmp_path: Path) -> None:
    """Also a whole model, if it says from which it was trained."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    adapter = make_adapter(base, tmp_path / "adapter", 1.0)
    whole = tmp_path / "whole"
    VisionLanguageModel.load(str(base)).save(whole, made={"step": 1})
    change_a_row(base)
    hashes = [model_hashes(str(path), None)["weights_hash"] for path in (tiny, base)]
    for destination in (adapter, whole):
        with pytest.raises(ValueError, match="it was trained on other weights") as error:
            VisionLanguageModel.load(str(base)).add_destination(str(destination))
        assert hashes[0] in str(error.value)
        assert hashes[1] in str(error.value)
        VisionLanguageModel.load(str(tiny)).add_destination(str(destination))
