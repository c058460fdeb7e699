"""Streamed data sets: samples, batches and stores as of listed ones, over processes, workers and interruptions."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lightning as L
import pytest
import torch
from conceptshift.callbacks import FeatureWriter
from conceptshift.datamodules import HubDataModule, MixtureDataModule
from conceptshift.datamodules.sample import Batch
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.datamodules.stream import StreamSampler
from datasets import Features, Value
from datasets import Image as ImageFeature
from datasets.packaged_modules.parquet.parquet import Parquet
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image
from torch import Tensor
from torch.utils.data import DistributedSampler

ROWS = 11


def encoded(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 255 - shade)).save(file, "PNG")
    return file.getvalue()


def columns(numbers: Sequence[int]) -> dict[str, Any]:
    return {
        "image": [{"bytes": encoded(20 * number), "path": None} for number in numbers],
        "caption": [f"Picture {number}." for number in numbers],
        "kind": [("safe", "unsafe")[number % 2] for number in numbers],
        "key": [f"k{number}" for number in numbers],
    }


FEATURES = Features({**dict.fromkeys(("caption", "kind", "key"), Value("string")), "image": ImageFeature()})


@pytest.fixture(autouse=True)
def no_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.parent / f"{tmp_path.name}-cache")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eleven rows in two files, of different lengths."""
    folder = tmp_path / "data"
    folder.mkdir()
    for part, numbers in enumerate((range(7), range(7, ROWS))):
        rows = datasets.Dataset.from_dict(columns(numbers), features=FEATURES)
        rows.to_parquet(folder / f"train-{part:05d}-of-00002.parquet", batch_size=2)
    return folder


@pytest.fixture
def make(tmp_path: Path, data: Path) -> Callable[..., HubDataModule]:
    def build(path: Path = data, streaming: bool = True, **options: Any) -> HubDataModule:
        splits = dict.fromkeys(("train_split", "val_split", "predict_split"), "train")
        defaults = {**splits, "prompt": "Say.", "target": "caption", "pictures": str(tmp_path / "pictures")}
        return HubDataModule(str(path), streaming=streaming, **{**defaults, "batch_size": 3, **options})

    return build


# --- sharing and shuffling ------------------------------------------------------------------------------


def shares(count: int, processes: int, **options: Any) -> list[list[int]]:
    options = {"padded": False, **options}
    return [list(StreamSampler(lambda: iter(range(count)), rank, processes, **options)) for rank in range(processes)]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 12])
def test_shares(count: int, processes: int) -> None:
    """Without padding each row once; with it, what torch's sampler gives of as many listed samples."""
    found = shares(count, processes)
    assert sorted(chain.from_iterable(found)) == list(range(count))
    assert found == [list(range(count))[rank::processes] for rank in range(processes)]
    if count:
        expected: list[list[int]] = [
            list(DistributedSampler(range(count), processes, rank, shuffle=False))  # type: ignore[arg-type]
            for rank in range(processes)
        ]
        assert shares(count, processes, padded=True) == expected


def test_shuffling() -> None:
    """Each row once; another order in each epoch and with each seed; the processes share one order."""
    first, second = shares(2500, 2, seed=0)
    assert sorted(first + second) == list(range(2500))
    assert [row for pair in zip(first, second, strict=True) for row in pair] == shares(2500, 1, seed=0)[0]
    assert shares(2500, 2, seed=0) == [first, second]
    assert shares(2500, 2, seed=0, epoch=1) != [first, second]
    assert shares(2500, 2, seed=1) != [first, second]
    # The first ones are from all over the buffer.
    assert min(first[:30]) < 200
    assert 700 < max(first[:30]) < 1100


def test_only_the_first_epoch_is_resumed() -> None:
    sampler = StreamSampler(lambda: iter(range(10)), 0, 1, True, seed=3, epoch=1, skip=4)
    rest = list(sampler)
    assert rest == shares(10, 1, padded=True, seed=3, epoch=1)[0][4:]
    sampler.set_epoch(2)
    assert sorted(sampler) == list(range(10))


# --- the same as listed ---------------------------------------------------------------------------------


class Toy(L.LightningModule):
    """A model of one weight that notes what it is given, in the place of a VLM."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[Batch] = []

    def encode(self, images: Sequence[Image.Image], prompts: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
        shades = torch.tensor([image.getpixel((0, 0))[0] for image in images])  # type: ignore[index]
        return {"shades": shades.float()}

    def _note(self, batch: Batch, batch_idx: int) -> None:
        self.batches.append(batch)

    validation_step = test_step = predict_step = _note

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return (self.weight * batch.inputs["shades"]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    @property
    def ids(self) -> list[list[str]]:
        return [batch.sample_ids for batch in self.batches]


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    def build(*callbacks: Callback, **options: Any) -> L.Trainer:
        defaults = {
            "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": bool(callbacks), "num_sanity_val_steps": 0,
        }  # fmt: skip
        return L.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **{**defaults, **options})

    return build


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "options", [{}, {"limit": 8}, {"label": "kind", "labels": ["unsafe"], "limit": 4}, {"sample_id": "key"}]
)
def test_batches(
    make: Callable[..., HubDataModule], trainer: Callable[..., L.Trainer], workers: int, options: dict[str, Any]
) -> None:
    noted = {}
    for streaming in (False, True):
        toy = Toy()
        trainer().predict(toy, datamodule=make(streaming=streaming, num_workers=workers, **options))
        noted[streaming] = toy
    assert noted[True].ids == noted[False].ids
    assert [batch.samples for batch in noted[True].batches] == [batch.samples for batch in noted[False].batches]
    for one, other in zip(noted[True].batches, noted[False].batches, strict=True):
        assert torch.equal(one.inputs["shades"], other.inputs["shades"])
    assert len(set(chain.from_iterable(noted[True].ids))) == min(options.get("limit", ROWS), ROWS)


@pytest.mark.parametrize("stage", ["validate", "predict"])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes(make: Callable[..., HubDataModule], processes: int, stage: str) -> None:
    """Of eleven samples, processes have different numbers, or repeat one where they wait for each other."""
    listed = make(streaming=False)
    listed.setup("predict")
    ids = [sample.sample_id for sample in listed.samples("predict")]
    for rank in range(processes):
        data = make()
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank, world_size=processes, lightning_module=Toy(), max_steps=1
        )
        data.setup(stage)
        loader = data.val_dataloader() if stage == "validate" else data.predict_dataloader()
        found = [sample_id for batch in loader for sample_id in batch.sample_ids]
        own = ids[rank::processes]
        assert found[: len(own)] == own
        assert len(found) == (len(own) if stage == "predict" else -(-ROWS // processes))


def write_arrow(folder: Path) -> str:
    datasets.Dataset.from_dict(columns(range(5)), features=FEATURES).save_to_disk(folder / "saved")
    (file,) = (folder / "saved").glob("*.arrow")
    file.rename(folder / "train.arrow")
    shutil.rmtree(folder / "saved")
    return "image"


def write_json(folder: Path) -> str:
    # Endings of pictures would make an `imagefolder` of it.
    rows = []
    for number in range(5):
        (folder / str(number)).write_bytes(encoded(20 * number))
        rows.append({"image": str(number), "caption": f"Picture {number}."})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "image"


def write_web(folder: Path) -> str:
    with tarfile.open(folder / "train.tar", "w") as archive:
        for number in range(5):
            files = {"png": encoded(20 * number), "txt": f"Picture {number}.".encode()}
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{number:04d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return "png"


@pytest.mark.parametrize("write", [write_arrow, write_json, write_web])
def test_formats(
    make: Callable[..., HubDataModule],
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    write: Callable[[Path], str],
) -> None:
    (tmp_path / "other").mkdir()
    image = write(tmp_path / "other")
    target = "txt" if image == "png" else "caption"
    noted = []
    for streaming in (False, True):
        toy = Toy()
        data = make(tmp_path / "other", streaming, image=image, target=target)
        trainer().predict(toy, datamodule=data)
        noted.append([(batch.samples, batch.inputs["shades"].tolist()) for batch in toy.batches])
    assert noted[0] == noted[1]
    assert [shade for _, shades in noted[1] for shade in shades] == [0, 20, 40, 60, 80]
    assert noted[1][0][0][1].target == "Picture 1."


# --- training -------------------------------------------------------------------------------------------


def trained(
    make: Callable[..., HubDataModule], trainer: L.Trainer, ckpt_path: Path | None = None, **options: Any
) -> list[list[str]]:
    toy = Toy()
    trainer.fit(toy, datamodule=make(seed=5, **options), ckpt_path=ckpt_path)
    return toy.ids


def test_epochs(make: Callable[..., HubDataModule], trainer: Callable[..., L.Trainer]) -> None:
    """Four batches an epoch, each sample once, in a new order; training reads pictures without writing them."""
    ids = trained(make, trainer(max_steps=8, limit_val_batches=0))
    first, second = list(chain(*ids[:4])), list(chain(*ids[4:]))
    assert sorted(first) == sorted(second) == sorted(f"train/{number}" for number in range(ROWS))
    assert first != second != sorted(first)
    assert not os.listdir(make().root)
    assert trained(make, trainer(max_steps=8, limit_val_batches=0), num_workers=2) == ids


class Stop(Callback):
    """Ends the process's work behind a batch, as a scheduler does."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            raise ZeroDivisionError


@pytest.mark.parametrize(("stop", "workers"), [(2, 0), (4, 0), (6, 0), (6, 2)])
def test_an_interrupted_fit_goes_on(
    make: Callable[..., HubDataModule],
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    stop: int,
    workers: int,
) -> None:
    """In the middle of the first epoch, at its end, and in the middle of the second."""
    options = {"max_steps": 10, "limit_val_batches": 0}
    whole = trained(make, trainer(**options))
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True, every_n_train_steps=1)
    with pytest.raises(ZeroDivisionError):
        trained(make, trainer(checkpoint, Stop(stop), **options), num_workers=workers)
    last = tmp_path / "checkpoints" / "last.ckpt"
    rest = trained(make, trainer(**options), last, num_workers=workers)
    # Checkpoints are written behind the other callbacks: the last batch is not in one.
    assert rest == whole[stop - 1 :]


def test_training_needs_a_number_of_steps(
    make: Callable[..., HubDataModule], trainer: Callable[..., L.Trainer]
) -> None:
    with pytest.raises(ValueError, match=r"streaming: .*; set --trainer.max_steps$"):
        trained(make, trainer(max_epochs=1))


# --- what is read, and what is refused ------------------------------------------------------------------


def test_texts_are_listed_without_pictures(make: Callable[..., HubDataModule], monkeypatch: pytest.MonkeyPatch) -> None:
    listed = make(streaming=False)
    listed.setup("predict")
    data = make()
    data.setup("predict")
    read: list[set[str]] = []
    cast = Parquet._cast_table

    def watched(self: Parquet, table: Any) -> Any:
        read.append(set(table.column_names))
        return cast(self, table)

    monkeypatch.setattr(Parquet, "_cast_table", watched)
    found = data.samples("predict")
    assert read
    assert set.union(*read) == {"caption"}
    for one, other in zip(found, listed.samples("predict"), strict=True):
        assert {**vars(one), "image": None} == {**vars(other), "image": None}


def test_a_limit_is_all_that_is_read(
    make: Callable[..., HubDataModule], trainer: Callable[..., L.Trainer], data: Path
) -> None:
    """The second file is broken, and nobody notices."""
    (data / "train-00001-of-00002.parquet").write_bytes(b"no parquet")
    toy = Toy()
    trainer().predict(toy, datamodule=make(limit=4))
    assert [len(ids) for ids in toy.ids] == [3, 1]
    with pytest.raises(ValueError, match=r"data: cannot be read as a data set"):
        trainer().predict(Toy(), datamodule=make())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "img"}, r"no column 'img' for --data.init_args.image; it has"),
        ({"predict_split": "nowhere"}, r"data: no split 'nowhere'; it has train$"),
        ({"target": "image"}, r"row 0: expected a text in 'image' for --data.init_args.target, got dict"),
        (
            {"label": "kind", "labels": ["odd"]},
            r"has no row with one of --data.init_args.labels, only with safe, unsafe",
        ),
        ({"sample_id": "kind"}, r"two samples have the id 'safe'; leave out --data.init_args.sample_id"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    make: Callable[..., HubDataModule], trainer: Callable[..., L.Trainer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        trainer().predict(Toy(), datamodule=make(**options))
    assert "\n" not in str(caught.value)


def test_what_needs_the_samples_beforehand(make: Callable[..., HubDataModule]) -> None:
    with pytest.raises(ValueError, match=r"parts: a mixture needs its samples beforehand; leave `streaming` out"):
        MixtureDataModule([make()])
    data = make()
    data.setup("predict")
    with pytest.raises(ValueError, match=r"streaming: Steerer and ShiftMonitor .*leave `streaming` out"):
        data.batches(data.samples("predict")[:1], Toy().encode)


# --- stores ---------------------------------------------------------------------------------------------


def extraction(model: Path, data: Path, store: Path, *more: str) -> list[str]:
    return [
        "predict", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model=FeatureExtraction",
        f"--model.model_id={model}", "--model.sites=[lm.block.1]", "--model.selectors=[last_prompt]",
        "--model.max_new_tokens=3", "--data=HubDataModule", f"--data.path={data}", "--data.prompt=What is it?",
        "--data.predict_split=train", f"--data.pictures={store.parent / 'pictures'}", "--data.batch_size=2",
        "--data.skip_bad_images=true", "--trainer.callbacks+=FeatureWriter", f"--trainer.callbacks.folder={store}",
        "--trainer.callbacks.shard_rows=3", *more,
    ]  # fmt: skip


def assert_same(one: Path, other: Path) -> None:
    found, expected = FeatureStore(one), FeatureStore(other)
    assert found.samples("original") == expected.samples("original")
    assert len(found.samples("original")) == ROWS - 1
    (ids, states), (wanted_ids, wanted) = (
        store.states("lm.block.1", "last_prompt", "original") for store in (found, expected)
    )
    assert ids == wanted_ids
    torch.testing.assert_close(states, wanted, rtol=1e-4, atol=1e-4)
    skipped = [json.loads((folder / "skipped.json").read_text()) for folder in (one, other)]
    assert skipped[0] == skipped[1]
    assert [row["sample_id"] for row in skipped[0]] == ["train/3"]


@pytest.fixture
def broken(data: Path) -> Path:
    """The same, with a picture that is none."""
    file = data / "train-00000-of-00002.parquet"
    rows = columns(range(7))
    rows["image"][3]["bytes"] = b"no picture"
    datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(file, batch_size=2)
    return data


@pytest.fixture
def listed(cli: Callable[..., Any], tiny: Path, broken: Path, tmp_path: Path) -> Path:
    done = cli(*extraction(tiny, broken, tmp_path / "listed"))
    assert done.status == 0, done.err
    return tmp_path / "listed"


class _Power(Exception):
    """It went out."""


def test_an_interrupted_extraction_goes_on(
    cli: Callable[..., Any], tiny: Path, broken: Path, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = extraction(tiny, broken, tmp_path / "streamed", "--data.streaming=true")
    end = FeatureWriter.on_predict_batch_end
    run: list[list[str]] = []

    def until(self: FeatureWriter, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        end(self, trainer, module, outputs, batch, batch_idx)
        run.append(batch.sample_ids)
        if len(run) == 4:
            raise _Power

    monkeypatch.setattr(FeatureWriter, "on_predict_batch_end", until)
    with pytest.raises(_Power):
        cli(*arguments)
    done = cli(*arguments, "--data.num_workers=1")
    assert done.status == 0, done.err
    assert_same(tmp_path / "streamed", listed)
    # Of four batches, two full shards of three or four are on disk.
    assert "train/0" not in chain(*run[4:])


def test_two_processes_write_the_store_that_one_writes(tiny: Path, broken: Path, listed: Path, tmp_path: Path) -> None:
    """Eleven samples: the processes have different numbers of batches."""
    program = shutil.which("conceptshift", path=str(Path(sys.executable).parent))
    assert program is not None
    more = ("--data.streaming=true", "--data.num_workers=1", "--trainer.strategy=ddp", "--trainer.devices=2")
    done = subprocess.run(
        [program, *extraction(tiny, broken, tmp_path / "two", *more)],
        cwd=tmp_path, env={key: value for key, value in os.environ.items() if not key.startswith("PL_")},
        capture_output=True, text=True, check=False, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "two").glob("rank-*"))) == 2, "it ran as one process"
    assert_same(tmp_path / "two", listed)
