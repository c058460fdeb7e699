"""The folder of a run: everything lies in it, and nothing that is finished is lost to a run that is not."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conceptshift.cli.lightning_cli import ConceptShiftCLI
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import FeatureExtraction, FineTuning, VisionLanguageModel
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

Run = Callable[..., Any]
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
SELECTOR, SITE = "answer", "lm.block.1"


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        # The configuration is that of the run that began last.
        if path.is_file() and path.name not in ("fit.yaml", "predict.yaml")
    }


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture
def train(fit: Run) -> Run:
    """Train LoRA into the folder of a run: `train(out, *more)`."""

    def run(out: Path, *more: object, steps: int = 2) -> Any:
        named = ("--callbacks.export=ModelExport", "--callbacks.checkpoint=ModelCheckpoint")
        keep = ("--callbacks.checkpoint.save_last=true", "--callbacks.checkpoint.enable_version_counter=false")
        return fit("--model.lora.rank=2", f"--out={out}", *named, *keep, *more, steps=steps)

    return run


@pytest.fixture
def extract(cli: Run, tiny: Path, shapes: Path) -> Run:
    """Extract states into the folder of a run: `extract(out, *more)`."""

    def run(out: Path, *more: object, model: Path = tiny, data: tuple[object, ...] | None = None) -> Any:
        source = data or ("--data=CaptionDataModule", f"--data.root={shapes}", "--data.predict_split=train")
        return cli(
            "predict", *QUIET, "--model=FeatureExtraction", f"--model.model_id={model}", f"--model.sites=[{SITE}]",
            f"--model.selectors=[{SELECTOR}]", "--model.max_new_tokens=4", *source, "--data.limit=9",
            "--data.batch_size=3", f"--out={out}", "--callbacks.features=FeatureWriter",
            "--callbacks.features.shard_rows=1", *more,
        )  # fmt: skip

    return run


class Stopped(Exception):
    """The power went out."""


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """Within `stop(n)` an extraction ends before its batch n."""

    def until(batch: int) -> Any:
        context = pytest.MonkeyPatch.context()

        class Stopping:
            def __enter__(self) -> None:
                patch = context.__enter__()
                step = FeatureExtraction.predict_step

                def predict_step(self: Any, given: Any, number: int) -> Any:
                    if number == batch:
                        raise Stopped
                    return step(self, given, number)

                patch.setattr(FeatureExtraction, "predict_step", predict_step)

            def __exit__(self, *raised: Any) -> None:
                context.__exit__(None, None, None)

        return Stopping()

    return until


# --- one folder ---------------------------------------------------------------------------------------------


def test_everything_of_a_training_lies_in_its_folder(train: Run, tmp_path: Path) -> None:
    given = ("--trainer.logger=true", "--callbacks.audit=TrainingAudit")
    assert train(tmp_path / "one", *given).status == 0
    assert {path.name for path in tmp_path.iterdir()} == {"one"}
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "adapter", "last.ckpt", "logs", "training_audit.json",
    } | {path.name for path in (tmp_path / "one").glob("epoch*.ckpt")}  # fmt: skip
    before = files(tmp_path / "one")
    # Redirected, it touches nothing of the other run.
    assert train(tmp_path / "two", *given, "--model.lora.rank=3").status == 0
    assert files(tmp_path / "one") == before
    assert (tmp_path / "two" / "last.ckpt").is_file()
    saved = (tmp_path / "one" / "logs" / "version_0" / "fit.yaml").read_text()
    assert f"out: {tmp_path / 'one'}" in saved
    assert saved.count(str(tmp_path / "one")) == 1


def test_callbacks_have_fixed_places_by_their_names(cli: Run, extract: Run, tmp_path: Path) -> None:
    named = [
        "--callbacks.mine=DictionaryFitter", f"--callbacks.mine.site={SITE}", f"--callbacks.mine.selector={SELECTOR}",
        "--callbacks.mine.dictionary=KMeans", "--callbacks.mine.dictionary.n_concepts=2",
        "--callbacks.ways=FineVectorMaker", f"--callbacks.ways.site={SITE}", "--callbacks.ways.dictionary=mine",
        "--callbacks.said=CaptionScorer",
    ]  # fmt: skip
    done = extract(tmp_path / "run", *named)
    assert done.status == 0, done.err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "features", "concepts", "vectors", "captions.json", "predict.yaml",
    }  # fmt: skip
    assert (tmp_path / "run" / "concepts" / "mine" / "dictionary.safetensors").is_file()
    assert len(list((tmp_path / "run" / "vectors" / "ways").iterdir())) == 2
    # What was saved runs again, elsewhere.
    done = cli("predict", f"--config={tmp_path / 'run' / 'predict.yaml'}", f"--out={tmp_path / 'again'}")
    assert done.status == 0, done.err
    assert files(tmp_path / "again").keys() == files(tmp_path / "run").keys()


def test_without_a_folder_a_callback_asks_for_one(cli: Run, validate: Run, extract: Run, tmp_path: Path) -> None:
    done = extract("", "--out=null")
    assert "features.folder: where to write? Give the run a folder: --out" in done.error
    assert validate("--callbacks.said=CaptionScorer").status == 0, "scores are only logged"
    assert not list(tmp_path.glob("*.json"))
    twice = ("--callbacks.one=CaptionScorer", "--callbacks.two=CaptionScorer", "--out=run")
    assert "would both write run/captions.json" in validate(*twice).error


def test_home_and_places_that_cannot_be_written(
    validate: Run, train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "mine.yaml").write_text("out: ~/from-yaml\ncallbacks:\n  said: {class_path: CaptionScorer}\n")
    assert validate(f"--config={tmp_path / 'mine.yaml'}").status == 0
    assert validate("--callbacks.said=CaptionScorer", "--out=~/from-flag").status == 0
    assert validate("--callbacks.said=CaptionScorer", "--callbacks.said.out=~/told/mine.json").status == 0
    assert {path.name for path in (tmp_path / "home").iterdir()} >= {"from-yaml", "from-flag", "told"}
    assert not (tmp_path / "~").exists()
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(FineTuning, "configure_model", lambda self: pytest.fail("the run has begun"))
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert f"--out: {out} cannot be written" in train(out).error
    told = ("--callbacks.said=CaptionScorer", f"--callbacks.said.out={tmp_path / 'file' / 'x.json'}")
    assert "said.out: " in (error := validate(*told).error)
    assert "cannot be written" in error


# --- what is finished stays ---------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", ["--trainer.fast_dev_run=1", "--trainer.limit_train_batches=1"])
def test_a_training_that_leaves_something_out_is_beside_a_finished_one(
    train: Run, tmp_path: Path, left_out: str
) -> None:
    assert train(tmp_path / "run").status == 0
    before = files(tmp_path / "run")
    with pytest.warns(UserWarning, match=r"leaves something out of the run, so that it writes to .*run-trial instead"):
        assert train(tmp_path / "run", left_out).status == 0
    assert files(tmp_path / "run") == before
    note = read(tmp_path / "run-trial" / "adapter" / "base_model.json")
    assert list(note["provenance"]["limits"]) == [left_out.removeprefix("--trainer.").partition("=")[0]]


def test_an_extraction_that_leaves_something_out_is_beside_a_finished_one(extract: Run, tmp_path: Path) -> None:
    limited = "--trainer.limit_predict_batches=2"
    assert extract(tmp_path / "run").status == 0
    before = files(tmp_path / "run")
    for more in ((), ("--callbacks.features.overwrite=true",)):
        assert extract(tmp_path / "run", limited, *more).status == 0
        assert files(tmp_path / "run") == before
    assert len(FeatureStore(tmp_path / "run-trial" / "features").samples("original")) == 6
    # Told by a callback of its own, too.
    told = f"--callbacks.features.folder={tmp_path / 'run' / 'features'}"
    assert extract(tmp_path / "other", limited, told).status == 0
    assert files(tmp_path / "run" / "features") == {
        name.removeprefix("features/"): content for name, content in before.items() if name.startswith("features/")
    }
    # Where nothing is, it may stand, says so, and gives way to a whole one.
    assert extract(tmp_path / "new", limited).status == 0
    assert FeatureStore(tmp_path / "new" / "features").metadata["limits"] == {"limit_predict_batches": 2}
    assert extract(tmp_path / "new").status == 0
    assert len(FeatureStore(tmp_path / "new" / "features").samples("original")) == 9


def test_an_interrupted_extraction_does_not_replace_a_finished_one(
    extract: Run, stop: Callable[[int], Any], tmp_path: Path
) -> None:
    assert extract(tmp_path / "run").status == 0
    before = files(tmp_path / "run")
    other = ("--model.max_new_tokens=5", "--callbacks.features.overwrite=true")
    with stop(2), pytest.raises(Stopped):
        extract(tmp_path / "run", *other)
    assert {name: files(tmp_path / "run")[name] for name in before} == before
    # It goes on where it stopped, and takes the place when it has ended.
    with stop(1):
        assert extract(tmp_path / "run", *other).status == 0
    assert FeatureStore(tmp_path / "run" / "features").metadata["max_new_tokens"] == 5
    assert len(FeatureStore(tmp_path / "run" / "features").samples("original")) == 9
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"features", "predict.yaml"}


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_training_does_not_replace_a_finished_one(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: type[BaseException]
) -> None:
    series = ("--callbacks.series=ModelExport", "--callbacks.series.every_n_steps=1")
    assert train(tmp_path / "run", *series, steps=3).status == 0
    before = files(tmp_path / "run")
    step = FineTuning.training_step

    def training_step(self: FineTuning, batch: Any, number: int) -> Any:
        if self.trainer.global_step == 2:
            raise raised("stop")
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "training_step", training_step)
        try:
            assert train(tmp_path / "run", *series, "--model.lora.alpha=8", steps=4).status != 0
        except RuntimeError:
            assert raised is RuntimeError
    after = files(tmp_path / "run")
    assert {name: after[name] for name in before if not name.endswith(".ckpt")} == {
        name: content for name, content in before.items() if not name.endswith(".ckpt")
    }
    assert train(tmp_path / "run", *series, "--model.lora.alpha=8", steps=2).status == 0
    assert sorted(path.name for path in (tmp_path / "run" / "series").iterdir()) == ["step-000001", "step-000002"]
    assert read(tmp_path / "run" / "adapter" / "adapter_config.json")["lora_alpha"] == 8


def test_a_finished_store_of_the_same_run_is_used_again(
    extract: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert extract(tmp_path / "run").status == 0
    before = files(tmp_path / "run" / "features")
    seen: list[int] = []
    step = FeatureExtraction.predict_step

    def predict_step(self: Any, given: Any, number: int) -> Any:
        seen.append(len(given.samples))
        return step(self, given, number)

    monkeypatch.setattr(FeatureExtraction, "predict_step", predict_step)
    with caplog.at_level("INFO"):
        done = extract(tmp_path / "run", "--callbacks.features.overwrite=true", "--data.batch_size=4")
    assert done.status == 0, done.err
    assert "is a finished store of exactly these states; it is used again" in caplog.text
    assert seen == [1], "Lightning calls nothing without a batch"
    assert files(tmp_path / "run" / "features") == before
    # Another question is another store.
    error = extract(tmp_path / "run", "--data.prompt=What?").error
    assert "holds the features of another run (`data.prompt` was 'Provide a one-sentence" in error
    assert files(tmp_path / "run" / "features") == before


# --- logs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shifted(extract: Run, tiny: Path, make_adapter: Run, tmp_path: Path) -> Run:
    """Measure a shift in one run: `shifted(out, *more)`."""
    adapter = make_adapter(tiny, tmp_path / "adapter", 1.0)

    def run(out: Path, *more: object) -> Any:
        fitter = [
            "--callbacks.original=DictionaryFitter", f"--callbacks.original.site={SITE}",
            f"--callbacks.original.selector={SELECTOR}", "--callbacks.original.dictionary=KMeans",
            "--callbacks.original.dictionary.n_concepts=2", "--callbacks.original.heat_maps=false",
        ]  # fmt: skip
        meter = ["--callbacks.words=ShiftMeter", "--callbacks.words.original=original"]
        draws = ["--callbacks.words.options.word_draws=20", "--callbacks.words.grounding.candidates=15"]
        return extract(out, f"--model.destination={adapter}", *fitter, *meter, *draws, *more)

    return run


def test_every_number_goes_to_any_logger(shifted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers: list[Any] = []
    run = ConceptShiftCLI._run_subcommand

    def kept(self: ConceptShiftCLI, subcommand: str) -> None:
        trainers.append(self.trainer)
        run(self, subcommand)

    monkeypatch.setattr(ConceptShiftCLI, "_run_subcommand", kept)
    done = shifted(tmp_path / "run", "--trainer.logger=CSVLogger")
    assert done.status == 0, done.err
    (path,) = (tmp_path / "run" / "logs").rglob("metrics.csv")
    logged = {name: row[name] for row in csv.DictReader(path.open()) for name in row if row[name]}
    means = read(tmp_path / "run" / "shift" / "words" / "shift.json")["means"]
    (trainer,) = trainers
    assert isinstance(trainer.logger, CSVLogger)
    for measure in ("magnitude", "recovery_shifted", "consistency"):
        tag = f"shift/words/{measure}"
        assert float(logged[tag]) == pytest.approx(means[measure])
        assert float(trainer.callback_metrics[tag]) == pytest.approx(means[measure])
    assert [name for name in logged if name.startswith("shift/words/concept_0") and name.endswith("/magnitude")], (
        sorted(logged)
    )
    assert "concepts/original/explained_variance" in logged
    # A name is a number or leads to others: some loggers make files and folders of them.
    assert not [name for name in logged if any(other.startswith(f"{name}/") for other in logged)]


def test_tensorboard_has_a_run_each_time_and_the_hyper_parameters(shifted: Run, tmp_path: Path) -> None:
    for _ in range(2):
        assert shifted(tmp_path / "run", "--trainer.logger=true").status == 0
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == ["version_0", "version_1"]
    for number in range(2):
        events = EventAccumulator(str(tmp_path / "run" / "logs" / f"version_{number}")).Reload()
        assert len(events.Scalars("shift/words/magnitude")) == 1
        summary = events.summary_metadata["_hparams_/session_start_info"]
        data = plugin_data_pb2.HParamsPluginData.FromString(summary.plugin_data.content)
        told = data.session_start_info.hparams
        assert told["model.max_new_tokens"].number_value == 4
        assert told["callbacks.original.dictionary.n_concepts"].number_value == 2
        assert told["data.predict_split"].string_value == "train"
        assert "hp_metric" not in events.Tags()["scalars"]


def test_a_checkpoint_of_another_model_is_refused(
    train: Run, tmp_path: Path, tiny: Path, make_model: Callable[..., Path]
) -> None:
    other = make_model(seed=6)
    assert train(tmp_path / "run").status == 0
    error = train(
        tmp_path / "again", f"--ckpt_path={tmp_path / 'run' / 'last.ckpt'}", f"--model.model_id={other}", steps=3
    ).error
    weights = [VisionLanguageModel.load(str(path)).weights_hash() for path in (tiny, other)]
    assert (
        f"--ckpt_path: of a training of {tiny} (weights {weights[0]}), not of {other} (weights {weights[1]})" in error
    )
    assert train(tmp_path / "again", f"--ckpt_path={tmp_path / 'run' / 'last.ckpt'}", steps=3).status == 0
