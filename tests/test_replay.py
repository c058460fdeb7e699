"""Replay: what the callbacks make of stored states is what they make while a model runs, and no model is loaded."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import torch
from conceptshift.cli.main import main
from conceptshift.concepts import load_dictionary, load_shift, load_steering_vectors
from conceptshift.datamodules import StoredFeatures
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone.readout import Readout
from conceptshift.tests.results import measured
from safetensors.torch import load_file, save_file

Run = Callable[..., Any]
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false")


def fitter(
    out: Path, variant: str = "original", method: str = "KMeans", n_concepts: int = 3, **more: object
) -> list[str]:
    options = {
        "site": "lm.block.2",
        "selector": "answer_mean",
        "dictionary": method,
        "dictionary.n_concepts": n_concepts,
        "variant": variant,
        "grounding.candidates": 60,
        "out": out / f"{variant}-{method}-{n_concepts}",
        **more,
    }
    return ["--trainer.callbacks+=DictionaryFitter", *(f"--trainer.callbacks.{k}={v}" for k, v in options.items())]


def job(out: Path) -> list[str]:
    """Two dictionaries, their shift, and a steering vector, all from the store of the run."""
    side = "{{selector: answer_mean, variant: {}}}"
    return [
        *fitter(out),
        *fitter(out, "destination"),
        "--trainer.callbacks+=ShiftMeter",
        f"--trainer.callbacks.original={out / 'original-KMeans-3'}",
        f"--trainer.callbacks.destination={out / 'destination-KMeans-3'}",
        f"--trainer.callbacks.out={out / 'shift'}",
        "--trainer.callbacks.grounding={candidates: 60, words: 5}",
        "--trainer.callbacks+=SteeringVectorMaker",
        "--trainer.callbacks.site=lm.block.2",
        f"--trainer.callbacks.target={side.format('destination')}",
        f"--trainer.callbacks.source={side.format('original')}",
        f"--trainer.callbacks.out={out / 'vector.safetensors'}",
    ]


@pytest.fixture(scope="module")
def extracted(make_adapter: Run, tiny: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the model: `features`, and beside it what `job` makes of them."""
    folder: Path = tmp_path_factory.mktemp("extracted")
    make_adapter(tiny, folder / "adapter", scale=0.1)
    assert not main([
        "predict", *QUIET, "--model=FeatureExtraction", f"--model.model_id={tiny}",
        f"--model.destination={folder / 'adapter'}", "--model.sites=[lm.block.2,lm.norm]",
        "--model.selectors=[answer_mean,answer]", "--model.max_new_tokens=5", "--data=CaptionDataModule",
        f"--data.root={shapes}", "--data.predict_split=train", "--data.limit=20", "--data.batch_size=4",
        "--trainer.callbacks+=FeatureWriter", f"--trainer.callbacks.folder={folder / 'features'}",
        "--trainer.callbacks.shard_rows=60", *job(folder / "live"),
    ])  # fmt: skip
    return folder


@pytest.fixture
def replay(cli: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Replay a store where no model can be loaded: `replay(folder, *more)`."""

    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(VisionLanguageModel, "load", forbidden)

    def run(folder: Path, *more: object) -> Any:
        return cli("predict", *QUIET, "--model=Replay", "--data=StoredFeatures", f"--data.folder={folder}", *more)

    return run


def same_json(ours: Path, reference: Path) -> dict[str, Any]:
    content: dict[str, Any] = measured(ours)
    expected = measured(reference)
    # Only a running model draws heat-maps.
    for picture in itertools.chain.from_iterable(expected.get("images", [])):
        assert (reference.parent / picture.pop("heat_map")).is_file()
    assert content == expected
    return content


def test_replay_makes_what_the_run_with_the_model_made(replay: Run, extracted: Path, tmp_path: Path) -> None:
    done = replay(extracted / "features", *job(tmp_path))
    assert done.status == 0, done.err
    live = extracted / "live"
    for name in ("original-KMeans-3", "destination-KMeans-3"):
        summary = same_json(tmp_path / name / "concepts.json", live / name / "concepts.json")
        assert len({tuple(words) for words in summary["words"]}) == 3
        assert sum(map(len, summary["words"])) > 5
        dictionaries = [load_dictionary(folder / name / "dictionary.safetensors") for folder in (tmp_path, live)]
        assert torch.equal(dictionaries[0].dictionary, dictionaries[1].dictionary)
        assert measured(dictionaries[0].metadata) == measured(dictionaries[1].metadata)
    shift = same_json(tmp_path / "shift" / "shift.json", live / "shift" / "shift.json")
    assert shift["means"]["magnitude"] > 0
    vectors = [load_shift(folder / "shift" / "shift.safetensors")[0].vectors for folder in (tmp_path, live)]
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=0, equal_nan=True)
    steering = [load_steering_vectors(folder / "vector.safetensors") for folder in (tmp_path, live)]
    assert measured(steering[0].metadata) == measured(steering[1].metadata)
    torch.testing.assert_close(steering[0].vectors, steering[1].vectors, rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_another_method_and_number_of_concepts(replay: Run, extracted: Path, tmp_path: Path, batch_size: int) -> None:
    more = fitter(tmp_path, method="SemiNMF", n_concepts=4)
    done = replay(extracted / "features", f"--data.batch_size={batch_size}", *more)
    assert done.status == 0, done.err
    assert len(list((extracted / "features").glob("rank-*/*.safetensors"))) > 2
    summary = json.loads((tmp_path / "original-SemiNMF-4" / "concepts.json").read_text())
    assert (summary["method"], summary["k"], summary["states"]) == ("SemiNMF", 4, 20)
    assert any(summary["words"])


def test_features_can_be_named(replay: Run, extracted: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(extracted / "features", tmp_path / "copy")
    done = replay(extracted / "features", *fitter(tmp_path, features=copy))
    assert done.status == 0, done.err
    same_json(tmp_path / "original-KMeans-3" / "concepts.json", extracted / "live/original-KMeans-3/concepts.json")


def test_more_processes_than_shards(extracted: Path) -> None:
    data = StoredFeatures(str(extracted / "features"), batch_size=100)
    data.setup("predict")
    data.trainer = cast(Any, SimpleNamespace(world_size=2, lightning_module=None))
    with pytest.raises(ValueError, match=r"1 batches of shards for 2 processes; use at most --trainer.devices 1"):
        data.predict_dataloader()


def test_features_of_another_model_are_refused(replay: Run, extracted: Path, tmp_path: Path) -> None:
    """Their words would be read out by the wrong model."""
    other = shutil.copytree(extracted / "features", tmp_path / "other")
    metadata = json.loads((other / "metadata.json").read_text())
    (other / "metadata.json").write_text(json.dumps({**metadata, "weights_hash": "0" * 64}))
    error = replay(extracted / "features", *fitter(tmp_path, features=other)).error
    assert f"{other}: its states are of another model" in error
    assert f"--data.init_args.folder {other}" in error


def test_callbacks_without_features(cli: Run, tiny: Path, shapes: Path, tmp_path: Path) -> None:
    data = ("--data=CaptionDataModule", f"--data.root={shapes}", "--data.limit=2")
    model = ("--model=FeatureExtraction", f"--model.model_id={tiny}", "--model.sites=[lm.norm]")
    run = ("predict", *QUIET, *model, "--model.selectors=[answer]", *data)
    writer = ("--trainer.callbacks+=FeatureWriter", f"--trainer.callbacks.folder={tmp_path / 'store'}")
    for callbacks in ([*fitter(tmp_path)], [*fitter(tmp_path), *writer]):
        error = cli(*run, *callbacks).error
        assert "DictionaryFitter needs `features`: 0 FeatureWriters are listed before it" in error
    assert not (tmp_path / "store").exists()


def test_bad_options_are_found_before_anything_runs(replay: Run, extracted: Path, tmp_path: Path) -> None:
    for option, message in (
        ({"grounding.words": 0}, "grounding.words must be at least 1, got 0"),
        ({"grounding.lexicon": tmp_path / "none.txt"}, "none.txt: cannot be read"),
        ({"held_out": 1.0}, "held_out must be at least 0 and below 1, got 1.0"),
        ({"stability_seeds": -1}, "stability_seeds must be at least 0, got -1"),
    ):
        assert message in replay(extracted / "features", *fitter(tmp_path, **option)).error


def test_a_resumed_or_renewed_store_has_the_readout_of_its_model(
    predict: Run, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    assert predict(store, "--data.limit=3").status == 0
    first = Readout.load(store)
    assert first.weights_hash == FeatureStore(store).metadata["weights_hash"]
    for name in ("states.parquet", "readout.safetensors"):
        (store / name).unlink()  # as if interrupted, in a version without readout
    assert predict(store, "--data.limit=3").status == 0
    assert torch.equal(Readout.load(store).unembedding, first.unembedding)
    assert predict(store, "--data.limit=3", "--trainer.callbacks.overwrite=true", model=make_model(seed=8)).status == 0
    other = Readout.load(store)
    assert other.weights_hash == FeatureStore(store).metadata["weights_hash"] != first.weights_hash
    assert not torch.equal(other.unembedding, first.unembedding)


# --- stores that cannot be replayed ---------------------------------------------------------------------


@pytest.fixture
def store(extracted: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(extracted / "features", tmp_path / "store"))


def last_shard(store: Path) -> Path:
    return max(store.glob("rank-*/*.safetensors"))


def test_a_truncated_shard(replay: Run, store: Path) -> None:
    path = last_shard(store)
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: missing or damaged" in replay(store).error


def test_a_missing_shard(replay: Run, store: Path) -> None:
    last_shard(store).unlink()
    assert f"{last_shard(store).parent}/" in replay(store).error


def test_a_shard_with_fewer_states_than_listed(replay: Run, store: Path) -> None:
    path = last_shard(store)
    save_file({site: states[:-1].clone() for site, states in load_file(path).items()}, path)
    error = replay(store).error
    assert path.name in error
    assert "but the index of the store has" in error


def test_states_that_are_no_numbers(replay: Run, store: Path) -> None:
    path = last_shard(store)
    tensors = load_file(path)
    tensors["lm.norm"][1, 2] = float("nan")
    save_file(tensors, path)
    error = replay(store).error
    assert f"{path.name}: 1 states at 'lm.norm' are not finite" in error


def test_a_store_of_an_older_version(replay: Run, store: Path, tmp_path: Path) -> None:
    """It has no readout; dictionaries can be learned from it only while the model runs."""
    (store / "readout.safetensors").unlink()
    assert replay(store).status == 0
    error = replay(store, *fitter(tmp_path)).error
    assert f"{store}: has no readout.safetensors" in error
    assert "instead of `Replay`" in error


def test_an_unfinished_store(replay: Run, store: Path) -> None:
    (store / "states.parquet").unlink()
    assert f"{store}: an unfinished feature store" in replay(store).error


def test_a_store_without_states(replay: Run, store: Path) -> None:
    table = pq.read_table(store / "states.parquet")
    pq.write_table(table.slice(0, 0), store / "states.parquet")
    assert f"{store}: holds no state" in replay(store).error


def test_replay_takes_stored_features_only(cli: Run, shapes: Path, tiny: Path, extracted: Path) -> None:
    error = cli("predict", *QUIET, "--model=Replay", "--data=CaptionDataModule", f"--data.root={shapes}").error
    assert "Replay goes through --data StoredFeatures, got CaptionDataModule" in error
    model = ("--model=FeatureExtraction", f"--model.model_id={tiny}", "--model.sites=[lm.norm]")
    stored = ("--data=StoredFeatures", f"--data.folder={extracted / 'features'}")
    error = cli("predict", *QUIET, *model, "--model.selectors=[answer]", *stored).error
    assert "StoredFeatures has no pictures for FeatureExtraction; run it with --model Replay" in error
    assert (
        "batch_size must be at least 1"
        in cli("predict", *QUIET, "--model=Replay", *stored, "--data.batch_size=0").error
    )


def test_nothing_is_written_while_replaying(replay: Run, extracted: Path, tmp_path: Path) -> None:
    error = replay(
        extracted / "features", "--trainer.callbacks+=FeatureWriter", f"--trainer.callbacks.folder={tmp_path / 'new'}"
    ).error
    assert "FeatureWriter writes what FeatureExtraction reads, got Replay" in error
