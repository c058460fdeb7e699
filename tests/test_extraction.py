"""`conceptshift predict`: stores that are complete, resumable, and the same whatever the batches."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conceptshift.callbacks import FeatureWriter
from conceptshift.concepts import load_dictionary
from conceptshift.datamodules.sample import Batch
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import FeatureExtraction, VisionLanguageModel
from torch import Tensor

Run = Callable[..., Any]
SELECTORS = ["answer", "answer_mean", "image", "last_prompt", "token_class:shape,shapes,star,many"]
ALL = f"--model.selectors={SELECTORS!r}"


def contents(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[list[str], Tensor]]]:
    """Samples without paths, and states of every site and selector that matched."""
    store = FeatureStore(folder)
    samples = {
        (variant, key): row for variant in store.metadata["variants"] for key, row in store.samples(variant).items()
    }
    index = pq.read_table(folder / "states.parquet")
    matched = set(zip(index["selector"].to_pylist(), index["variant"].to_pylist(), strict=True))
    states = {
        f"{site} {selector} {variant}": store.states(site, selector, variant)
        for site in store.metadata["sites"]
        for selector, variant in sorted(matched)
    }
    return {str(key): row for key, row in samples.items()}, states


def assert_same(ours: Path, reference: Path, exactly: bool = False) -> None:
    (samples, states), (samples_there, states_there) = contents(ours), contents(reference)
    assert samples == samples_there
    assert states.keys() == states_there.keys()
    for name, (ids, values) in states.items():
        assert ids == states_there[name][0], name
        tolerance = 0.0 if exactly else 1e-4
        torch.testing.assert_close(values, states_there[name][1], rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def zero_adapter(make_adapter: Run, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = make_adapter(tiny, tmp_path_factory.mktemp("adapter") / "zero", scale=0)
    return made


@pytest.fixture(scope="module")
def adapter(make_adapter: Run, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = make_adapter(tiny, tmp_path_factory.mktemp("adapter") / "some", scale=0.2)
    return made


@pytest.mark.parametrize(
    ("answers", "site", "selectors"),
    [("generated", "lm.block.*", SELECTORS), ("target", "lm.norm", SELECTORS), ("generated", "*.block.1", ["image"])],
)
def test_stores_do_not_depend_on_the_batch_size(
    predict: Run, tmp_path: Path, answers: str, site: str, selectors: list[str]
) -> None:
    more = (f"--model.answers={answers}", f"--model.selectors={selectors!r}", "--data.limit=10")
    for size in (1, 3, 8):
        assert predict(tmp_path / f"{size}", *more, f"--data.batch_size={size}", site=site).status == 0
    assert_same(tmp_path / "3", tmp_path / "1")
    assert_same(tmp_path / "8", tmp_path / "1")
    samples, states = contents(tmp_path / "1")
    assert len(samples) == 10
    assert len({row["text"] for row in samples.values()}) >= 5
    for name, (ids, _) in states.items():
        assert len(ids) >= (640 if "image" in name else 1), name


def test_worker_processes_change_nothing(predict: Run, tmp_path: Path) -> None:
    assert predict(tmp_path / "workers", "--data.num_workers=1", "--data.limit=5", "--data.batch_size=2").status == 0
    assert predict(tmp_path / "plain", "--data.limit=5", "--data.batch_size=2").status == 0
    assert_same(tmp_path / "workers", tmp_path / "plain", exactly=True)


def test_a_store_tells_where_it_comes_from(predict: Run, tmp_path: Path, tiny: Path, shapes: Path) -> None:
    assert predict(tmp_path / "store", "--data.limit=2").status == 0
    metadata = FeatureStore(tmp_path / "store").metadata
    assert metadata["model_id"] == str(tiny)
    assert metadata["sites"] == ["lm.block.1"]
    assert metadata["data"]["root"] == str(shapes)
    content = (tiny / "model.safetensors").read_bytes()
    name = json.dumps({"model.safetensors": hashlib.sha256(content).hexdigest()})
    assert metadata["weights_hash"] == f"files:{hashlib.sha256(name.encode()).hexdigest()}"
    row = FeatureStore(tmp_path / "store").samples("original")["1"]
    assert row["image"] == str(shapes / "train2014" / "COCO_train2014_000000000001.jpg")
    assert len(row["references"]) == 5


class _Power(Exception):
    """It went out."""


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Stop the next extraction behind its n-th batch."""
    end = FeatureWriter.on_predict_batch_end

    def until(self: FeatureWriter, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        end(self, trainer, module, outputs, batch, batch_idx)
        if batch_idx + 1 == after:
            raise _Power

    monkeypatch.setattr(FeatureWriter, "on_predict_batch_end", until)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of all samples that a model was run on."""
    ids: list[str] = []
    step = FeatureExtraction.predict_step

    def watched(self: FeatureExtraction, batch: Batch, batch_idx: int) -> Any:
        ids.extend(batch.sample_ids)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(FeatureExtraction, "predict_step", watched)
    return ids


@pytest.mark.parametrize("after", [1, 4, 6])
def test_an_interrupted_extraction_goes_on(
    predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[str], after: int
) -> None:
    """16 samples in batches of 3, 6 batches; a shard is full after every second batch or so."""
    options = (ALL, "--data.limit=16", "--data.batch_size=3", "--trainer.callbacks.shard_rows=400")
    assert predict(tmp_path / "whole", *options).status == 0
    seen.clear()
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(_Power):
            predict(tmp_path / "parts", *options)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("rank-*/*")}
    with pytest.raises(ValueError, match="unfinished"):
        FeatureStore(tmp_path / "parts")
    lost = len(seen) - sum(pq.read_table(path).num_rows for path in written if path.name.endswith(".samples.parquet"))
    assert lost <= 6
    done = predict(tmp_path / "parts", *options)
    assert done.status == 0, done.err
    assert_same(tmp_path / "parts", tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert len(seen) == 16 + lost, "something on disk was extracted again"


def test_an_interruption_before_the_merge(
    predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[str]
) -> None:
    """All samples are on disk, only the index is missing: the last shard is redone, and the store is finished."""
    small = ("--data.limit=4", "--data.batch_size=2", "--trainer.callbacks.shard_rows=1")
    with monkeypatch.context() as patch:
        patch.setattr("conceptshift.callbacks.feature_writer.merge_store", _full)
        assert "No space left" in predict(tmp_path / "store", *small).error
    seen.clear()
    done = predict(tmp_path / "store", *small)
    assert done.status == 0, done.err
    assert len(seen) == 2
    assert predict(tmp_path / "whole", "--data.limit=4").status == 0
    assert_same(tmp_path / "store", tmp_path / "whole")


def _full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_overwriting_an_unfinished_store_extracts_everything(
    predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    """The model in the same folder was trained on since: no old shard may stay, and no sample be missed."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    options = ("--data.limit=6", "--data.batch_size=2", "--trainer.callbacks.shard_rows=1")
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(_Power):
            predict(tmp_path / "store", *options, model=model)
    changed = VisionLanguageModel.load(str(model))
    with torch.no_grad():
        changed.final_norm.weight.mul_(2)  # type: ignore[operator]
    changed.save(model)
    assert "`weights_hash` was 'files:" in predict(tmp_path / "store", *options, model=model).error
    done = predict(tmp_path / "store", *options, "--trainer.callbacks.overwrite=true", model=model)
    assert done.status == 0, done.err
    assert len(FeatureStore(tmp_path / "store").samples("original")) == 6


def test_another_runs_store_is_refused(predict: Run, tmp_path: Path) -> None:
    assert predict(tmp_path / "store", "--data.limit=2").status == 0
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    error = predict(tmp_path / "store", "--data.limit=2", "--model.max_new_tokens=3").error
    assert f"{tmp_path / 'store'}: holds the features of another run (`max_new_tokens` was 5, and is 3)" in error
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()} == before
    more = ("--data.limit=2", "--model.max_new_tokens=3", "--trainer.callbacks.overwrite=true")
    assert predict(tmp_path / "store", *more).status == 0
    assert FeatureStore(tmp_path / "store").metadata["max_new_tokens"] == 3


@pytest.mark.parametrize("failing", [".safetensors", ".states.parquet", "metadata.json", "skipped.json"])
def test_a_full_disk(predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    replace = os.replace

    def until_full(source: Path, target: Path) -> None:
        if str(target).endswith(failing):
            _full()
        replace(source, target)

    monkeypatch.setattr("conceptshift.records.files.os.replace", until_full)
    error = predict(tmp_path / "store", "--data.limit=3").error
    assert "No space left on device" in error
    assert failing in error
    assert "free some space or choose another folder" in error
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert predict(tmp_path / "store", "--data.limit=3").status == 0
    assert len(FeatureStore(tmp_path / "store").samples("original")) == 3


# --- original and destination ---------------------------------------------------------------------------


def test_a_zero_adapter_shifts_nothing(predict: Run, tmp_path: Path, zero_adapter: Path) -> None:
    options = [ALL, f"--model.destination={zero_adapter}", "--data.limit=12", "--data.batch_size=5"]
    for variant in ("original", "destination"):
        options += [
            "--trainer.callbacks+=DictionaryFitter",
            f"--trainer.callbacks.features={tmp_path / 'store'}",
            "--trainer.callbacks.site=lm.block.2",
            "--trainer.callbacks.selector=answer_mean",
            "--trainer.callbacks.dictionary=KMeans",
            "--trainer.callbacks.dictionary.n_concepts=3",
            f"--trainer.callbacks.variant={variant}",
            f"--trainer.callbacks.out={tmp_path / variant}",
        ]
    options += ["--trainer.callbacks+=ShiftMeter", f"--trainer.callbacks.features={tmp_path / 'store'}"]
    options += [f"--trainer.callbacks.{name}={tmp_path / name}" for name in ("original", "destination")]
    done = predict(tmp_path / "store", *options, f"--trainer.callbacks.out={tmp_path / 'shift'}", site="lm.block.2")
    assert done.status == 0, done.err
    samples, states = contents(tmp_path / "store")
    assert len(samples) == 24
    for selector in SELECTORS:
        original, destination = (states[f"lm.block.2 {selector} {name}"] for name in ("original", "destination"))
        assert original[0] == destination[0]
        assert torch.equal(original[1], destination[1]), selector
    shift = json.loads((tmp_path / "shift" / "shift.json").read_text())
    assert shift["means"]["magnitude"] == 0
    assert [concept["magnitude"] for concept in shift["concepts"]] == [0, 0, 0]
    assert sum(concept["samples"] for concept in shift["concepts"]) == shift["pairs"]
    dictionaries = [load_dictionary(tmp_path / name / "dictionary.safetensors") for name in ("original", "destination")]
    assert torch.equal(dictionaries[0].dictionary, dictionaries[1].dictionary)


def test_the_original_is_the_model_without_adapter(predict: Run, tmp_path: Path, adapter: Path) -> None:
    assert predict(tmp_path / "pair", f"--model.destination={adapter}", "--data.limit=7").status == 0
    assert predict(tmp_path / "plain", "--data.limit=7").status == 0
    (pair_samples, pair), (samples, plain) = contents(tmp_path / "pair"), contents(tmp_path / "plain")
    ids, states = plain["lm.block.1 answer original"]
    assert pair["lm.block.1 answer original"][0] == ids
    assert torch.equal(pair["lm.block.1 answer original"][1], states)
    assert {key: row for key, row in pair_samples.items() if "original" in key} == samples
    texts = [{row["text"] for key, row in pair_samples.items() if name in key} for name in ("original", "destination")]
    assert texts[0] != texts[1], "the adapter should change something"


def test_the_destination_alone(predict: Run, tmp_path: Path, adapter: Path) -> None:
    options = (f"--model.destination={adapter}", "--data.limit=4")
    assert predict(tmp_path / "pair", *options).status == 0
    assert predict(tmp_path / "alone", *options, "--model.variants=[destination]").status == 0
    ours, reference = contents(tmp_path / "alone")[1], contents(tmp_path / "pair")[1]
    assert list(ours) == ["lm.block.1 answer destination"]
    assert torch.equal(ours["lm.block.1 answer destination"][1], reference["lm.block.1 answer destination"][1])
    error = predict(tmp_path / "none", "--model.variants=[destination]").error
    assert "no 'destination'; there are original, and --model.init_args.destination names more" in error


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"text_width": 96}, {}),
        ({"text_layers": 5}, {}),
        ({"text_layers": 5}, {"target_modules": ["q_proj"], "layers_to_transform": [4], "layers_pattern": "layers"}),
        ({}, {"target_modules": ["model.multi_modal_projector.linear_1", "lm_head"]}),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    predict: Run,
    make_adapter: Run,
    make_model: Callable[..., Path],
    tmp_path: Path,
    tiny: Path,
    sizes: dict[str, int],
    options: dict[str, Any],
) -> None:
    """Also one that would fit in part: the destination would be neither model."""
    adapter = make_adapter(make_model(**sizes) if sizes else tiny, tmp_path / "foreign", scale=0.1, **options)
    if not sizes:
        # Made for a model whose layers have other names.
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["target_modules"] = ["transformer.h.0.attn.c_attn"]
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    error = predict(tmp_path / "store", f"--model.destination={adapter}", "--data.limit=2").error
    assert f"adapter '{adapter}' does not fit '{tiny}'" in error
    assert not (tmp_path / "store").exists()


def test_a_folder_that_is_no_adapter(predict: Run, tmp_path: Path) -> None:
    error = predict(tmp_path / "store", f"--model.destination={tmp_path}").error
    assert f"destination '{tmp_path}': neither a PEFT adapter nor a model" in error
    assert not (tmp_path / "store").exists()


# --- bad input ------------------------------------------------------------------------------------------


def test_skipped_pictures_are_listed(predict: Run, tmp_path: Path, shapes: Path) -> None:
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    folder = root / "train2014"
    (folder / "COCO_train2014_000000000002.jpg").unlink()
    (folder / "COCO_train2014_000000000003.jpg").write_bytes(b"<html>")
    options = ("--data.limit=7", "--data.batch_size=2")
    error = predict(tmp_path / "stopped", *options, root=root).error
    assert "COCO_train2014_000000000002.jpg: no such picture" in error
    assert not (tmp_path / "stopped" / "states.parquet").exists()
    assert predict(tmp_path / "store", *options, "--data.skip_bad_images=true", root=root).status == 0
    skipped = json.loads((tmp_path / "store" / "skipped.json").read_text())
    assert [row["sample_id"] for row in skipped] == ["2", "3"]
    assert "no such picture" in skipped[0]["reason"]
    assert "not a picture" in skipped[1]["reason"]
    assert predict(tmp_path / "good", *options).status == 0
    ours, reference = contents(tmp_path / "store"), contents(tmp_path / "good")
    assert list(ours[0]) == [key for key in reference[0] if "'2'" not in key and "'3'" not in key]


def test_no_readable_picture_at_all(predict: Run, tmp_path: Path, shapes: Path) -> None:
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    shutil.rmtree(root / "val2014")
    options = ("--data.skip_bad_images=true", "--data.batch_size=2")
    assert "no sample was extracted" in predict(tmp_path / "store", *options, root=root, split="val").error


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_picture_is_one_line(predict: Run, tmp_path: Path, shapes: Path, workers: int) -> None:
    root = tmp_path / "shapes"
    shutil.copytree(shapes, root)
    (path := root / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    error = predict(tmp_path / "store", f"--data.num_workers={workers}", "--data.limit=2", root=root).error
    assert error.startswith(f"conceptshift: {path}: no such picture")


def test_states_that_are_no_numbers(predict: Run, tmp_path: Path, tiny: Path) -> None:
    broken = VisionLanguageModel.load(str(tiny))
    with torch.no_grad():
        broken.decoder.layers[1].mlp.down_proj.weight.mul_(1e30)  # type: ignore[union-attr,index]
        broken.decoder.layers[1].mlp.up_proj.weight.mul_(1e30)  # type: ignore[union-attr,index]
    broken.save(tmp_path / "broken")
    # The check of the model would find it first.
    error = predict(tmp_path / "store", "--data.limit=2", model=tmp_path / "broken").error
    assert "tmp" in error
    assert not (tmp_path / "store" / "states.parquet").exists()


def test_states_that_are_no_numbers_in_one_sample(
    predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FeatureExtraction._run

    def spoiled(self: FeatureExtraction, batch: Batch) -> Any:
        done = run(self, batch)
        if "3" in batch.sample_ids:
            done.states["lm.block.1"][batch.sample_ids.index("3"), :, 5] = float("inf")
        return done

    monkeypatch.setattr(FeatureExtraction, "_run", spoiled)
    error = predict(tmp_path / "store", ALL, "--data.limit=4", "--data.batch_size=4", "--model.answers=target").error
    assert "non-finite states at 'lm.block.1' (original) for sample '3'" in error
    assert "float32" in error
    assert not (tmp_path / "store" / "states.parquet").exists()


def test_a_token_of_interest_that_never_occurs(predict: Run, tmp_path: Path) -> None:
    done = predict(
        tmp_path / "store",
        "--data.limit=4",
        "--trainer.callbacks+=DictionaryFitter",
        f"--trainer.callbacks.features={tmp_path / 'store'}",
        "--trainer.callbacks.site=lm.block.1",
        "--trainer.callbacks.selector=token_of_interest:zebra",
        "--trainer.callbacks.dictionary=KMeans",
        f"--trainer.callbacks.out={tmp_path / 'dictionary'}",
        selector="token_of_interest:zebra",
    )
    assert "selector 'token_of_interest:zebra' matched none of 4 original samples" in done.error
    assert not (tmp_path / "dictionary").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.sites=['lm.block.7']"], "site 'lm.block.7' not found"),
        (["--model.sites=['lm.embed','vision.block.0']"], "site 'vision.block.0' has states of visual tokens only"),
        (["--model.sites=[]"], "sites and .selectors need at least one entry"),
        (["--model.selectors=['token']"], "selector 'token': expected one of"),
        (["--model.max_new_tokens=0"], "--model.init_args.max_new_tokens must be at least 1, got 0"),
        (["--model.model_id=/nowhere/at/all"], "model_id '/nowhere/at/all'"),
    ],
)
def test_bad_options(predict: Run, tmp_path: Path, options: list[str], message: str) -> None:
    error = predict(tmp_path / "store", *options).error
    assert message in error
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_low_precision_runs(predict: Run, tmp_path: Path, precision: str) -> None:
    done = predict(tmp_path / "store", "--data.limit=3", f"--trainer.precision={precision}")
    assert done.status == 0, done.err
    assert len(FeatureStore(tmp_path / "store").samples("original")) == 3


def test_a_writer_without_extraction(validate: Run, tmp_path: Path) -> None:
    done = validate("--trainer.callbacks+=FeatureWriter", f"--trainer.callbacks.folder={tmp_path / 'store'}")
    assert "FeatureWriter writes what FeatureExtraction reads, got FineTuning" in done.error
