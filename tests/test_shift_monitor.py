"""ShiftMonitor: what it shows while a model trains is what is measured afterwards, and the training does not notice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.callbacks import ShiftMonitor
from conceptshift.concepts import KMeans
from conceptshift.datamodules import CaptionDataModule
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import FineTuning, VisionLanguageModel
from conceptshift.tests.results import measured
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from .test_distributed import DDP, conceptshift

Run = Callable[..., Any]
LORA = ("--model.lora.rank=4", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.01")
FULL = ("--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.003")
SITE, SELECTOR = "lm.block.2", "answer_mean"


def monitor(out: Path, root: Path, every: int = 2, samples: int = 12) -> list[str]:
    options = {
        "data": "CaptionDataModule", "data.root": root, "data.predict_split": "train", "data.batch_size": 5,
        "site": SITE, "selector": SELECTOR, "every_n_steps": every, "samples": samples, "out": out,
        "dictionary": "KMeans", "dictionary.n_concepts": 3, "options.word_draws": 20, "grounding.candidates": 15,
    }  # fmt: skip
    given = [f"--trainer.callbacks.{name}={value}" for name, value in options.items()]
    return ["--trainer.callbacks+=ShiftMonitor", *given]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def export(folder: Path, *more: str) -> list[str]:
    return ["--trainer.callbacks+=ModelExport", f"--trainer.callbacks.folder={folder}", *more]


NO_CHECKPOINT = "--trainer.enable_checkpointing=false"


def assert_close(ours: Any, reference: Any, path: str = "") -> None:
    """Equal, and numbers to rounding. Of two samples in one concept, which is nearer to the middle is rounding too."""
    ours, reference = measured(ours), measured(reference)
    if isinstance(ours, dict):
        assert ours.keys() == reference.keys(), path
        for key in ours:
            if not key.startswith("images_"):
                assert_close(ours[key], reference[key], f"{path}/{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(reference), path
        for number, pair in enumerate(zip(ours, reference, strict=True)):
            assert_close(*pair, f"{path}/{number}")
    elif isinstance(ours, float):
        assert ours == pytest.approx(reference, rel=1e-4, abs=1e-4), path
    else:
        assert ours == reference, path


@pytest.mark.parametrize("train", [LORA, FULL], ids=["lora", "full"])
def test_its_last_point_is_the_offline_shift(
    fit: Run, cli: Run, tiny: Path, shapes: Path, tmp_path: Path, train: tuple[str, ...]
) -> None:
    """Of a series, and with each checkpoint in it, from what ModelExport wrote; by LoRA and by full fine-tuning."""
    out = tmp_path / "run" / "shift" / "words"
    series = export(tmp_path / "series", "--trainer.callbacks.every_n_steps=2")
    done = fit(*train, *monitor(out, shapes), *series, NO_CHECKPOINT, steps=5)
    assert done.status == 0, done.err
    offline = tmp_path / "offline"
    done = cli(
        "predict", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model=FeatureExtraction",
        f"--model.model_id={tiny}", f"--model.destination={tmp_path / 'series'}", f"--model.sites=[{SITE}]",
        f"--model.selectors=[{SELECTOR}]", "--model.answers=target", "--data=CaptionDataModule",
        f"--data.root={shapes}", "--data.predict_split=train", "--data.limit=12", "--data.batch_size=7",
        "--trainer.callbacks+=FeatureWriter", f"--trainer.callbacks.folder={offline / 'features'}",
        "--trainer.callbacks+=DictionaryFitter", f"--trainer.callbacks.site={SITE}",
        f"--trainer.callbacks.selector={SELECTOR}", "--trainer.callbacks.dictionary=KMeans",
        "--trainer.callbacks.dictionary.n_concepts=3", f"--trainer.callbacks.out={offline / 'original'}",
        "--trainer.callbacks+=ShiftMeter", f"--trainer.callbacks.original={offline / 'original'}",
        f"--trainer.callbacks.out={offline / 'words'}", "--trainer.callbacks.options.word_draws=20",
        "--trainer.callbacks.grounding.candidates=15",
    )  # fmt: skip
    assert done.status == 0, done.err
    for name in ("shift.json", "trajectory.json"):
        assert_close(read(out / name), read(offline / "words" / name))
    path = read(out / "trajectory.json")
    assert [point["variant"] for point in path["points"]] == ["step-000002", "step-000004", "step-000005"]
    last, shift = path["points"][-1], read(out / "shift.json")
    assert last["means"]["magnitude"] == shift["means"]["magnitude"] > 0
    assert [row["words_shifted"] for row in last["concepts"]] == [row["words_shifted"] for row in shift["concepts"]]
    assert last["means"]["aligned"] == pytest.approx(1)
    assert path["points"][0]["means"]["magnitude"] < last["means"]["magnitude"]
    start = path["start"]
    assert start["means"] == {
        "magnitude": 0, "cosine_shifted": shift["means"]["cosine_original"],
        "recovery_shifted": shift["means"]["recovery_original"],
    }  # fmt: skip
    for before, after, row in zip(start["concepts"], last["concepts"], shift["concepts"], strict=True):
        assert (before["samples"], before["magnitude"]) == (row["samples"], 0)
        assert (before["recovery_shifted"], before["cosine_shifted"]) == (
            row["recovery_original"], row["cosine_original"],
        )  # fmt: skip
        assert after["consistency"] == row["consistency"]
        for measure in after["intervals"]:
            assert after["intervals"][measure] == row["intervals"][measure]
        assert ("recovery_shifted" in after["intervals"]) is bool(row["intervals"])
        assert bool(after["p_adjusted"]) is not row["too_few_samples"]
    assert last["intervals"]["magnitude"] == shift["intervals"]["magnitude"]


def test_the_training_does_not_notice_it(fit: Run, shapes: Path, tmp_path: Path) -> None:
    dropout = "--model.lora.dropout=0.3"
    for name, more in (("with", monitor(tmp_path / "out", shapes)), ("without", [])):
        done = fit(*LORA, dropout, *more, *export(tmp_path / name), NO_CHECKPOINT, steps=5)
        assert done.status == 0, done.err
    ours, reference = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert ours.keys() == reference.keys()
    assert all(torch.equal(value, reference[name]) for name, value in ours.items())


@pytest.mark.parametrize("train", [LORA, FULL], ids=["lora", "full"])
def test_an_interrupted_run_gives_the_same_trajectory(
    fit: Run, shapes: Path, tmp_path: Path, train: tuple[str, ...]
) -> None:
    def checkpoints(name: str) -> list[str]:
        return [
            "--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path / name}",
            "--trainer.callbacks.every_n_train_steps=3", "--trainer.callbacks.save_top_k=-1",
        ]  # fmt: skip

    # What dropout draws is not taken up again.
    common = [*train, "--trainer.max_epochs=-1", *(["--model.lora.dropout=0"] if train == LORA else [])]
    done = fit(*common, *monitor(tmp_path / "whole", shapes), *checkpoints("checkpoints"), steps=6)
    assert done.status == 0, done.err
    out = tmp_path / "interrupted"
    assert fit(*common, *monitor(out, shapes), *checkpoints("other"), steps=6).status == 0
    # What lies behind the checkpoint, steps 4 and 6, is measured again.
    (resume,) = (tmp_path / "other").glob("*step=3.ckpt")
    done = fit(*common, *monitor(out, shapes), f"--ckpt_path={resume}", steps=6)
    assert done.status == 0, done.err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert FeatureStore(out / "features").metadata["variants"] == [
        "original", "step-000002", "step-000004", "step-000006",
    ]  # fmt: skip
    assert_close(read(out / "trajectory.json"), read(tmp_path / "whole" / "trajectory.json"))
    if train == FULL:
        error = fit(*common, *monitor(tmp_path / "lost", shapes), f"--ckpt_path={resume}", steps=6).error
        assert "has no states of the original, and the resumed model is no longer it" in error


def test_probes_of_another_run_are_not_gone_on_with(fit: Run, shapes: Path, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", tmp_path / "run.ckpt"
    saved = [
        "--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path}",
        "--trainer.callbacks.filename=run", "--trainer.callbacks.every_n_train_steps=2",
    ]  # fmt: skip
    assert fit(*LORA, *monitor(out, shapes), *saved, steps=2).status == 0
    before = read(out / "features" / "metadata.json")
    for changed, key in (
        (monitor(out, shapes, samples=9), "data.hash"),
        ([option.replace(SELECTOR, "answer") for option in monitor(out, shapes)], "selectors"),
    ):
        error = fit(*LORA, *changed, f"--ckpt_path={checkpoint}", NO_CHECKPOINT, steps=4).error
        assert f"{out / 'features'}: holds the probes of another run (`{key}" in error
        assert "give this one another --out, or start anew without --ckpt_path" in error
        assert not out.with_name(".out.new").exists()
    assert read(out / "features" / "metadata.json") == before
    assert (out / "shift.json").exists()


def test_a_run_that_fails_leaves_what_an_earlier_one_measured(fit: Run, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fit(*LORA, *monitor(out, shapes, every=1), NO_CHECKPOINT, steps=2).status == 0
    names = ("shift.json", "shift.safetensors", "trajectory.json", "figures", "destination/dictionary.safetensors")
    results = [out / name for name in names]
    assert all(path.exists() for path in results)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    unknown = [option.replace(SELECTOR, "token_of_interest:unicorn") for option in monitor(out, shapes)]
    assert "matched none" in fit(*LORA, *unknown, NO_CHECKPOINT).error
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before
    # One that ends takes its place, whole.
    assert fit(*LORA, *monitor(out, shapes, every=1), NO_CHECKPOINT, steps=3).status == 0
    assert len(read(out / "trajectory.json")["points"]) == 3
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_tensorboard_shows(fit: Run, shapes: Path, tmp_path: Path) -> None:
    logger = [
        "--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.name=",
        "--trainer.logger.version=logs",
    ]  # fmt: skip
    out = tmp_path / "shift" / "words"
    assert fit(*LORA, *monitor(out, shapes), *logger, NO_CHECKPOINT, steps=4).status == 0
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    tags = events.Tags()
    for measure in ("magnitude", "consistency", "cosine_shifted", "recovery_shifted"):
        for concept in range(3):
            tag = f"shift/words/live/concept_{concept:02d}/{measure}"
            assert [event.step for event in events.Scalars(tag)] == [2, 4], tag
    live = events.Scalars("shift/words/live/magnitude")
    assert live[0].value < live[1].value
    assert live[1].value == pytest.approx(read(out / "shift.json")["means"]["magnitude"], rel=1e-5)
    assert [event.step for event in events.Scalars("shift/words/aligned")] == [2, 4]
    assert 0 < events.Scalars("shift/words/live/cost")[-1].value < 1
    assert "shift/words/live/pictures" in tags["images"]
    for figure in ("words", "recovery", "samples", "trajectory"):
        assert f"shift/words/{figure}" in tags["images"]
        assert (out / "figures" / f"{figure}.png").stat().st_size > 5000
    assert "shift/words/live/words/text_summary" in tags["tensors"]


def test_two_processes_read_the_probe_set_together(fit: Run, tiny: Path, shapes: Path, tmp_path: Path) -> None:
    """Eleven samples: neither process has as many as the other."""
    arguments = [
        "fit", "--trainer.enable_progress_bar=false", "--trainer.max_steps=2", "--trainer.limit_val_batches=0",
        "--model=FineTuning", f"--model.model_id={tiny}", "--data=CaptionDataModule", f"--data.root={shapes}",
        "--data.batch_size=4", *LORA, *monitor(tmp_path / "two", shapes, samples=11), NO_CHECKPOINT,
    ]  # fmt: skip
    done = conceptshift(tmp_path, *arguments, *DDP)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr, "it ran as one process"
    assert fit(*LORA, *monitor(tmp_path / "one", shapes, samples=11), NO_CHECKPOINT, steps=2).status == 0
    (ids, states), (wanted_ids, wanted) = (
        FeatureStore(tmp_path / name / "features").states(SITE, SELECTOR, "original") for name in ("two", "one")
    )
    assert ids == wanted_ids
    assert len(ids) == 11
    torch.testing.assert_close(states, wanted, rtol=1e-4, atol=1e-4)
    assert len(FeatureStore(tmp_path / "two" / "features").samples("step-000002")) == 11
    assert read(tmp_path / "two" / "shift.json")["pairs"] == 11


def test_the_dictionary_of_an_extraction(fit: Run, shapes: Path, tmp_path: Path) -> None:
    """One that was fitted before, of the same site and model; others are refused before training."""
    assert fit(*LORA, *monitor(tmp_path / "first", shapes), NO_CHECKPOINT, steps=2).status == 0
    fitted = f"--trainer.callbacks.dictionary={tmp_path / 'first' / 'original'}"
    options = [
        option.replace("--trainer.callbacks.dictionary=KMeans", fitted)
        for option in monitor(tmp_path / "again", shapes)
        if "n_concepts" not in option
    ]
    assert fit(*LORA, *options, NO_CHECKPOINT, steps=2).status == 0
    assert_close(read(tmp_path / "again" / "shift.json"), read(tmp_path / "first" / "shift.json"))
    elsewhere = [option.replace(SITE, "lm.block.1") for option in options]
    assert "give the original's of the same site and selector" in fit(*LORA, *elsewhere, NO_CHECKPOINT).error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("every_n_steps=2", "every_n_steps=0"), "every_n_steps of ShiftMonitor must be at least 1, got 0"),
        ((f"site={SITE}", "site=vision.block.0"), "reads one site of the language model"),
        ((f"site={SITE}", "site=lm.block.9"), "site 'lm.block.9' not found"),
        ((f"selector={SELECTOR}", "selector=token_of_interest:unicorn"), "matched none of 12 original samples"),
    ],
)
def test_bad_input_stops_before_training(
    fit: Run, shapes: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    options = [option.replace(*change) for option in monitor(tmp_path / "out", shapes)]
    assert message in fit(*LORA, *options, NO_CHECKPOINT).error
    assert not (tmp_path / "out" / "shift.json").exists()


def test_a_probe_leaves_the_model_in_training(tiny: Path, shapes: Path, tmp_path: Path) -> None:
    """Also parts that somebody keeps in evaluation mode."""
    from conceptshift.callbacks.parts.probe import _evaluating

    model = VisionLanguageModel.load(str(tiny)).train()
    model.model.get_encoder(modality="image").eval()
    before = [part.training for part in model.modules()]
    assert True in before
    assert False in before

    def fail() -> None:
        with _evaluating(model):
            assert not any(part.training for part in model.modules())
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert [part.training for part in model.modules()] == before


def test_it_watches_fine_tuning_only(shapes: Path, tmp_path: Path) -> None:
    data = CaptionDataModule(str(shapes))
    callback = ShiftMonitor(data, SITE, SELECTOR, KMeans(3), str(tmp_path))

    class Sharded:
        strategy = object()

    with pytest.raises(ValueError, match=r"which object does not allow; use --trainer.strategy ddp"):
        callback.setup(Sharded(), FineTuning("model"), "fit")  # type: ignore[arg-type]
