"""Import of states that XL-VLMs saved: every form of its files, pairing, and files that must not be read."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conceptshift.cli.import_features import _site
from conceptshift.concepts import KMeans, concept_shift, load_dictionary, load_shift
from conceptshift.datamodules.foreign_features import ForeignFeatures, sample_ids
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules.backbone.readout import Readout
from torch import Tensor

Run = Callable[..., Any]
Content = dict[str, Any]
ImportPair = Callable[[list[int]], list[dict[str, Tensor]]]

BLOCK, NORM = "language_model.model.layers.2", "language_model.model.norm"
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false")


def saved(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def content_of(
    numbers: list[int] | None = None,
    seed: int = 0,
    shape: tuple[int, ...] = (1, 1, 64),
    dtype: torch.dtype | None = None,
) -> Content:
    """What XL-VLMs saves. The states of picture n depend on n alone; those of multiples of 4 do not count."""
    numbers = list(range(12)) if numbers is None else numbers
    states = {n: torch.randn(2, 64, generator=torch.Generator().manual_seed(1000 * seed + n)) for n in numbers}
    return {
        "hidden_states": [
            {BLOCK: states[n][0].view(shape).to(dtype), NORM: states[n][1].view(shape).to(dtype)} for n in numbers
        ],
        "token_of_interest_mask": torch.tensor([n % 4 != 0 for n in numbers]),
        "image": [[f"coco/{n:03d}.jpg"] for n in numbers],
        "model_predictions": [[f"a dog and {n}"] for n in numbers],
    }


def expected(content: Content, module: str) -> tuple[list[str], Tensor]:
    """Ids and states of the rows that count, in order of id."""
    rows = [
        (str(image[0]).removeprefix("coco/"), modules[module].reshape(-1).float())
        for image, modules, chosen in zip(
            content["image"], content["hidden_states"], content["token_of_interest_mask"], strict=True
        )
        if chosen
    ]
    rows.sort(key=lambda row: row[0])
    return [name for name, _ in rows], torch.stack([state for _, state in rows])


@pytest.fixture
def run_import(cli: Run, tiny: Path, tmp_path: Path) -> Run:
    """`run_import(original, *more)`, to the folder `store`."""

    def run(original: Path, *more: object, model: Path = tiny) -> Any:
        return cli("import-features", original, "--model", model, "--out", tmp_path / "store", *more)

    return run


def read(path: Path) -> ForeignFeatures:
    return ForeignFeatures.read(path)


# --- what is read -----------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Content], Content]] = {
    "as saved": lambda content: content,
    "mask a list of tensors": lambda content: {
        **content, "token_of_interest_mask": [value[None] for value in content["token_of_interest_mask"]],
    },
    "mask a list of booleans": lambda content: {
        **content, "token_of_interest_mask": content["token_of_interest_mask"].tolist(),
    },
    "flat strings": lambda content: {
        **content,
        "image": [image for (image,) in content["image"]],
        "model_predictions": [text for (text,) in content["model_predictions"]],
    },
    "states [1, D]": lambda content: {
        **content,
        "hidden_states": [{name: state[0] for name, state in row.items()} for row in content["hidden_states"]],
    },
    "other keys": lambda content: {**content, "targets": [["x"]], "instruction": None},
    "states that were trained through": lambda content: {
        **content,
        "hidden_states": [
            {name: state.clone().requires_grad_() for name, state in row.items()} for row in content["hidden_states"]
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_form_gives_the_same_rows(tmp_path: Path, form: str, zipped: bool) -> None:
    content = content_of()
    file = read(saved(tmp_path / "f.pth", FORMS[form](content), _use_new_zipfile_serialization=zipped))
    assert file.images == [f"coco/{n:03d}.jpg" for n in range(12)]
    assert file.texts == [f"a dog and {n}" for n in range(12)]
    assert file.chosen == [n for n in range(12) if n % 4]
    assert file.widths == {BLOCK: 64, NORM: 64}
    for module in (BLOCK, NORM):
        stacked = file.stack(module, file.chosen)
        assert torch.equal(stacked, expected(content, module)[1])
        assert not stacked.requires_grad


def test_a_file_without_mask_or_texts(tmp_path: Path) -> None:
    content = content_of()
    file = read(saved(tmp_path / "f.pth", {key: content[key] for key in ("hidden_states", "image")}))
    assert file.chosen == list(range(12))
    assert file.texts == [""] * 12


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """Also where it is compressed only in part: a file of a few MB may need all memory."""
    path = saved(tmp_path / "f.pth", {**content_of(), "ignored": torch.zeros(100_000)})
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "c.pth", "w") as packed:
        for entry in plain.infolist():
            large = entry.file_size > 100_000
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED if large else zipfile.ZIP_STORED)
    assert (tmp_path / "c.pth").stat().st_size < path.stat().st_size / 5
    assert torch.load(tmp_path / "c.pth", mmap=False)["ignored"].shape == (100_000,)
    with pytest.raises(ValueError, match=r"c.pth: is compressed; .* again with torch.save"):
        read(tmp_path / "c.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_with_fewer_bytes_than_values_are_refused(tmp_path: Path, zipped: bool) -> None:
    """A file of 2 KiB would need a terabyte."""
    options = {"_use_new_zipfile_serialization": zipped}
    rows = [{BLOCK: torch.zeros(1, 1).expand(1, 10**12)}]
    path = saved(tmp_path / "a.pth", {"hidden_states": rows, "image": ["1.jpg"]}, **options)
    with pytest.raises(ValueError, match=r"row 0 at .* must be one dense state .* got float32 \[1, 1000000000000\]"):
        read(path)
    for count in (10**12, 12):
        mask = torch.ones(1, dtype=torch.bool).expand(count)
        saved(path, {**content_of(), "token_of_interest_mask": mask}, **options)
        with pytest.raises(ValueError, match=rf"must be a boolean tensor \[N\] .* got bool \[{count}\]"):
            read(path)
    columns = torch.randn(64, 3).t()[:, None]  # views of one tensor, as of a batch, have all they need
    content = {"hidden_states": [{BLOCK: state} for state in columns], "image": ["1.jpg", "2.jpg", "3.jpg"]}
    assert torch.equal(read(saved(path, content, **options)).stack(BLOCK, range(3)), columns[:, 0])


def test_the_length_of_a_mask_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a Python list it takes many times its memory."""
    path = saved(tmp_path / "a.pth", {**content_of(), "token_of_interest_mask": torch.ones(50_000, dtype=torch.bool)})
    monkeypatch.setattr(Tensor, "tolist", _raising(AssertionError("as a list")), raising=False)
    with pytest.raises(ValueError, match="50000 entries in 'token_of_interest_mask', but 12 in 'hidden_states'"):
        read(path)


def test_ids_are_file_names_unless_these_repeat(tmp_path: Path) -> None:
    first = read(saved(tmp_path / "a.pth", {**content_of([1, 2]), "image": ["train/1.jpg", "train/2.jpg"]}))
    moved = read(saved(tmp_path / "b.pth", {**content_of([1, 2]), "image": ["/data/2.jpg", "1.jpg"]}))
    again = read(saved(tmp_path / "c.pth", {**content_of([1, 2]), "image": ["train/1.jpg", "val/1.jpg"]}))
    with pytest.warns(UserWarning, match="folders differ") as caught:
        assert sample_ids([first, moved]) == [["1.jpg", "2.jpg"], ["2.jpg", "1.jpg"]]
    assert len(caught) == 1, "where a path has no folder, it does not differ"
    assert sample_ids([first, again]) == [["train/1.jpg", "train/2.jpg"], ["train/1.jpg", "val/1.jpg"]]


@pytest.mark.parametrize(
    ("other", "example"),
    [
        (["/data/coco/val2014/1.jpg", "/data/coco/val2014/3.jpg"], "coco/train2014/1.jpg and /data/coco/val2014/1.jpg"),
        (["/data/coco/train2014/1.jpg", "/data/coco/train2014/2.jpg"], None),
        (["train2014/1.jpg", "2.jpg"], None),
        (["val2014/7.jpg", "val2014/8.jpg"], None),  # pairs with nothing
    ],
)
def test_pairs_from_different_folders_are_told(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, other: list[str], example: str | None
) -> None:
    own = ["coco/train2014/1.jpg", "coco/train2014/2.jpg"]
    files = [
        read(saved(tmp_path / f"{name}.pth", {**content_of([1, 2]), "image": images}))
        for name, images in (("a", own), ("b", other))
    ]
    sample_ids(files)
    told = [str(warning.message) for warning in recwarn if "folders differ" in str(warning.message)]
    assert len(told) == (example is not None)
    if example is not None:
        assert f"{files[1].path}: 1 of 1 rows are paired by file name with rows of {files[0].path}" in told[0]
        assert f"e.g. {example}; if these are different pictures, extract both files from the same folder" in told[0]


@pytest.mark.parametrize(
    ("module", "site"),
    [
        ("language_model.model.layers.31", "lm.block.31"),
        ("model.language_model.layers.0", "lm.block.0"),
        ("model.layers.7", "lm.block.7"),
        ("model.text_model.layers.12", "lm.block.12"),
        ("base_model.model.language_model.model.layers.31", "lm.block.31"),
        ("language_model.model.norm", "lm.norm"),
        ("model.norm", "lm.norm"),
        ("vision_tower.vision_model.encoder.layers.23", "vision.block.23"),
        ("model.vision_tower.vision_model.encoder.layers.3", "vision.block.3"),
        ("visual.blocks.5", "vision.block.5"),
        ("language_model.model.layers.31.mlp", "language_model.model.layers.31.mlp"),
        ("model.connector.perceiver_resampler.layers.1", "model.connector.perceiver_resampler.layers.1"),
        ("model.connector.perceiver_resampler.norm", "model.connector.perceiver_resampler.norm"),
        ("vision_tower.vision_model.post_layernorm", "vision_tower.vision_model.post_layernorm"),
        ("multi_modal_projector", "multi_modal_projector"),
    ],
)
def test_sites_of_modules(module: str, site: str) -> None:
    assert _site(module) == site


# --- the store --------------------------------------------------------------------------------------------


def test_one_file(run_import: Run, tiny: Path, tmp_path: Path) -> None:
    content = content_of()
    done = run_import(saved(tmp_path / "a.pth", content), "--word", "dog", "--images", "/pictures")
    assert done.status == 0, done.err
    assert f"{BLOCK} → lm.block.2, width 64" in done.out
    assert f"{NORM} → lm.norm, width 64" in done.out
    assert "a.pth: 9 of 12 samples have a state" in done.out
    store = FeatureStore(tmp_path / "store")
    for site, module in (("lm.block.2", BLOCK), ("lm.norm", NORM)):
        ids, states = store.states(site, "token_of_interest:dog", "original")
        assert ids == expected(content, module)[0]
        assert torch.equal(states, expected(content, module)[1])
    assert set(store.tokens("token_of_interest:dog", "original")) == {"dog"}
    samples = store.samples("original")
    assert len(samples) == 12
    assert samples["003.jpg"] == {
        "sample_id": "003.jpg", "variant": "original", "image": "/pictures/coco/003.jpg", "prompt": "",
        "text": "a dog and 3", "references": [], "answers": [], "label": "", "input": None,
    }  # fmt: skip
    assert store.metadata["variants"] == ["original"]
    assert store.metadata["checkpoints"] == store.metadata["checkpoint_hashes"] == {}
    assert store.metadata["model_id"] == str(tiny)
    assert store.metadata["weights_hash"] == Readout.load(tmp_path / "store").weights_hash
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "store"]


def test_modules_of_this_release_of_transformers(run_import: Run, shared_backbone: Any, tmp_path: Path) -> None:
    """A hook finds the same modules under these names."""
    names = {id(module): name for name, module in shared_backbone.model.named_modules()}
    wanted = ["lm.block.1", "lm.norm", "vision.block.0"]
    modules = {site.name: names[id(site.module)] for site in shared_backbone.sites(wanted)}
    rows = [{name: torch.randn(1, 1, 64) for name in modules.values()}]
    path = saved(tmp_path / "a.pth", {"hidden_states": rows, "image": ["1.jpg"]})
    assert run_import(path).status == 0
    store = FeatureStore(tmp_path / "store")
    assert store.metadata["imported"]["original"]["modules"] == modules
    for site, name in modules.items():
        assert torch.equal(store.states(site, "token_of_interest", "original")[1], rows[0][name][0])


@pytest.mark.parametrize("shuffled", [False, True])
def test_two_files_are_paired_by_picture(run_import: Run, tmp_path: Path, shuffled: bool) -> None:
    numbers = list(range(3, 16))
    if shuffled:
        random.Random(0).shuffle(numbers)
    original, destination = content_of(), content_of(numbers, seed=1)
    destination["image"] = [[f"/elsewhere/{image}"] for (image,) in destination["image"]]
    b = saved(tmp_path / "b.pth", destination)
    done = run_import(saved(tmp_path / "a.pth", original), "--destination", b)
    assert done.status == 0, done.err
    assert f"both         {len(set(range(12)) & set(numbers) - {4, 8})} samples" in done.out
    store = FeatureStore(tmp_path / "store")
    assert store.metadata["variants"] == ["original", "destination"]
    files = store.metadata["imported"]
    assert {name: file["file"] for name, file in files.items()} == {"original": "a.pth", "destination": "b.pth"}
    assert files["destination"]["hash"] == hashlib.sha256(b.read_bytes()).hexdigest()
    ids, states = store.states("lm.block.2", "token_of_interest", "destination")
    reference = content_of(sorted(numbers), seed=1)
    assert ids == expected(reference, BLOCK)[0]
    assert torch.equal(states, expected(reference, BLOCK)[1])
    assert store.samples("destination")["015.jpg"]["text"] == "a dog and 15"


@pytest.mark.parametrize("count", [300, 5000])
def test_more_rows_than_a_piece_and_a_shard(run_import: Run, tmp_path: Path, count: int) -> None:
    states = torch.randn(count, 1, 1, 64)
    rows = [{BLOCK: state} for state in states]
    images = [f"{n:05d}.jpg" for n in range(count)]
    mask = torch.arange(count) >= 290  # pieces without a state
    path = saved(tmp_path / "a.pth", {"hidden_states": rows, "image": images, "token_of_interest_mask": mask})
    assert run_import(path).status == 0
    store = FeatureStore(tmp_path / "store")
    ids, found = store.states("lm.block.2", "token_of_interest", "original")
    assert ids == images[290:]
    assert torch.equal(found, states[290:, 0, 0])
    assert len(store.samples("original")) == count


def test_states_keep_their_precision(run_import: Run, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.pth", content_of(dtype=torch.float16))
    b = saved(tmp_path / "b.pth", content_of(seed=1, dtype=torch.bfloat16))
    assert run_import(a, "--destination", b).status == 0
    store = FeatureStore(tmp_path / "store")
    found = [store.read_shard(shard)["lm.norm"].dtype for shard in store.shard_rows()]
    assert found == [torch.float16, torch.bfloat16]


def test_the_same_import_again_and_another(run_import: Run, tmp_path: Path) -> None:
    a, b = (saved(tmp_path / f"{seed}.pth", content_of(seed=seed)) for seed in range(2))
    assert run_import(a).status == 0
    assert run_import(a, "--images", "p").status == 0
    store = FeatureStore(tmp_path / "store")
    assert store.samples("original")["001.jpg"]["image"] == "p/coco/001.jpg"
    assert f"--out {tmp_path / 'store'}: is there and holds something else" in run_import(b).error
    assert "holds something else" in run_import(a, "--word", "dog").error
    assert FeatureStore(tmp_path / "store").metadata == store.metadata
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "notes.txt").write_text("mine")
    assert "holds something else" in run_import(a).error
    assert (tmp_path / "store" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("left", ["store", ".store.part", ".store.replaced"])
def test_an_import_that_is_interrupted_leaves_the_earlier_store_or_the_new_one(
    run_import: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """Wherever it is interrupted while it removes or writes a folder; the next one leaves nothing behind."""
    path = saved(tmp_path / "a.pth", content_of())
    assert run_import(path).status == 0
    remove = shutil.rmtree

    def interrupted(folder: Path, **options: Any) -> None:
        if Path(folder).name == left and Path(folder).exists():
            (Path(folder) / "metadata.json").unlink()
            raise KeyboardInterrupt
        remove(folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        if left == ".store.part":
            patch.setattr("conceptshift.cli.import_features.merge_store", _raising(OSError("disk full")))
        with contextlib.suppress(KeyboardInterrupt):
            run_import(path)
    FeatureStore(tmp_path / "store").states("lm.norm", "token_of_interest", "original")
    assert run_import(path).status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "store"]


def _raising(error: Exception) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


# --- what is refused --------------------------------------------------------------------------------------


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_refused_and_not_executed(run_import: Run, tmp_path: Path, zipped: bool, protocol: int) -> None:
    trace = tmp_path / "executed"
    options: Content = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    path = saved(tmp_path / "a.pth", {**content_of(), "more": Payload(trace)}, **options)
    error = run_import(path).error
    assert f"{path}: refused, because it" in error
    assert "nothing was executed; where you trust it, load it and save its tensors" in error
    if protocol == 2:
        assert f"it holds {os.system.__module__}.system;" in error
    assert not trace.exists()
    assert not (tmp_path / "store").exists()
    # It is a payload indeed.
    torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize(("value", "name"), [(np.float32(1), "numpy"), (argparse.Namespace(a=1), "argparse.Namespace")])
def test_objects_of_other_classes_are_refused(tmp_path: Path, value: object, name: str) -> None:
    path = saved(tmp_path / "a.pth", {**content_of(), "args": value})
    with pytest.raises(ValueError, match=rf"a.pth: refused, because it holds {name}.*nothing was executed"):
        read(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_anywhere(tmp_path: Path, zipped: bool) -> None:
    whole = saved(tmp_path / "a.pth", content_of(), _use_new_zipfile_serialization=zipped).read_bytes()
    path = tmp_path / "cut.pth"
    for length in [0, 1, 3, 4, 22, 100, *range(200, len(whole), len(whole) // 60), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"cut.pth: (truncated, damaged, or not written by torch.save|refused)"
        ) as caught:
            read(path)
        assert "Errno" not in str(caught.value)


def test_truncated_on_the_command_line(run_import: Run, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", content_of())
    path.write_bytes(path.read_bytes()[:-500])
    assert "a.pth: truncated, damaged, or not written by torch.save" in run_import(path).error


def test_a_text_is_no_saved_file(tmp_path: Path) -> None:
    """Of such files torch says a bare number, in which there is no reason."""
    path = tmp_path / "a.pth"
    for text in (b"hello\n", b"hi", b"image,state\n"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"a.pth: (truncated, damaged|refused)") as caught:
            read(path)
        assert not re.search(r"\(\W*\d+\W*\)", str(caught.value))


def test_something_else_than_a_saved_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(ValueError, match=r"a.pth: "):
        read(path)
    with pytest.raises(ValueError, match=r"none.pth: no such file; give a .pth file"):
        read(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"a.pth: holds a list, expected a dict with 'hidden_states' and 'image'"):
        read(saved(path, [1, 2]))


def without(key: str) -> Callable[[Content], Content]:
    return lambda content: {name: value for name, value in content.items() if name != key}


def replaced(row: int, module: str, state: object) -> Callable[[Content], Content]:
    def change(content: Content) -> Content:
        content["hidden_states"][row][module] = state
        return content

    return change


def dropped(content: Content) -> Content:
    del content["hidden_states"][5][NORM]
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("hidden_states"),
            r"no 'hidden_states' among its keys, \['token_of_interest_mask', 'image', 'model_predictions'\]",
        ),
        (without("image"), "no 'image' among its keys"),
        (
            lambda c: {**c, "hidden_states": {}},
            "'hidden_states' must be a list with an entry a sample, got a dict of 0",
        ),
        (lambda c: {**c, "hidden_states": torch.zeros(2)}, "'hidden_states' must be a list .* got float32 .2."),
        (lambda c: {**c, "image": c["image"][1:]}, "11 entries in 'image', but 12 in 'hidden_states'"),
        (lambda c: {**c, "model_predictions": ["x"]}, "1 entries in 'model_predictions', but 12"),
        (
            lambda c: {**c, "token_of_interest_mask": c["token_of_interest_mask"][:4]},
            "4 entries in 'token_of_interest_mask', but 12",
        ),
        (
            lambda c: {**c, "token_of_interest_mask": c["token_of_interest_mask"].int()},
            r"must be a boolean tensor \[N\] or a list of booleans, got int32 \[12\]",
        ),
        (
            lambda c: {**c, "token_of_interest_mask": [torch.tensor([True, False])] * 12},
            r"'token_of_interest_mask' of row 0 must be one boolean, got bool \[2\]",
        ),
        (
            lambda c: {**c, "token_of_interest_mask": torch.zeros(12, dtype=torch.bool)},
            "'token_of_interest_mask' is true for none of 12 samples",
        ),
        (lambda c: {**c, "image": [["a", "b"]] * 12}, "'image' of row 0 must be a string or a list of one string"),
        (lambda c: {**c, "image": ["x", ""] * 6}, "'image' of row 1 is empty"),
        (lambda c: {**c, "model_predictions": [[3]] * 12}, "'model_predictions' of row 0 must be a string"),
        (lambda c: {**c, "hidden_states": [torch.zeros(1, 4)] * 12}, r"row 0 must be a dict .* got float32 \[1, 4\]"),
        (replaced(7, BLOCK, torch.zeros(1, 9, 64)), r"row 7 at 'language_model.model.layers.2' .*float32 \[1, 9, 64\]"),
        (replaced(7, BLOCK, torch.zeros(64)), r"must be one dense state \[1, 1, D\] or \[1, D\], got float32 \[64\]"),
        (replaced(7, BLOCK, torch.zeros(1, 64).int()), r"got int32 \[1, 64\]"),
        (replaced(7, BLOCK, torch.zeros(1, 64).to_sparse()), r"got float32 \[1, 64\]"),
        (replaced(7, BLOCK, "x"), "got 'x'"),
        (replaced(7, NORM, torch.zeros(1, 63)), "row 7 at 'language_model.model.norm' has width 63, but row 0 has 64"),
        (dropped, "row 5 at 'language_model.model.norm' has width None, but row 0 has 64"),
    ],
)
def test_another_layout(tmp_path: Path, change: Callable[[Content], Content], message: str) -> None:
    path = saved(tmp_path / "a.pth", change(content_of()))
    with pytest.raises(ValueError, match=f"a.pth: .*{message}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_no_numbers(run_import: Run, tmp_path: Path, value: float) -> None:
    content = content_of()
    content["hidden_states"][8][NORM][0, 0, 5] = value  # of a row that does not count
    assert run_import(saved(tmp_path / "a.pth", content)).status == 0
    shutil.rmtree(tmp_path / "store")
    content["hidden_states"][9][NORM][0, 0, 5] = value
    error = run_import(saved(tmp_path / "a.pth", content)).error
    assert f"a.pth: 'hidden_states' of row 9 (coco/009.jpg) at {NORM!r} are not finite" in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_picture_in_several_rows(run_import: Run, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", content_of([1, 2, 3, 2]))
    error = run_import(path).error
    assert f"{path}: rows 1 and 3 are both of coco/002.jpg; they cannot be told apart and could not be paired" in error


def test_files_that_do_not_belong_together(run_import: Run, tmp_path: Path) -> None:
    a = saved(tmp_path / "a.pth", content_of())

    def refused(content: Content) -> str:
        b = saved(tmp_path / "b.pth", content)
        error: str = run_import(a, "--destination", b).error
        assert str(a) in error
        assert str(b) in error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.pth"]
        return error

    assert "no picture has a state in both files" in refused(content_of(list(range(20, 30))))
    other = content_of()
    other["token_of_interest_mask"] = ~other["token_of_interest_mask"]
    assert "no picture has a state in both files" in refused(other)
    other = content_of()
    for row in other["hidden_states"]:
        row[NORM] = torch.zeros(1, 1, 32)
    error = refused(other)
    assert "states of width 64 at 'lm.norm', but" in error
    assert "states of width 32 at 'lm.norm'" in error
    for row in other["hidden_states"]:
        del row[NORM]
    assert "b.pth none at 'lm.norm'" in refused(other)


def test_an_adapter_around_the_destination_changes_no_site(run_import: Run, tmp_path: Path) -> None:
    a, content = saved(tmp_path / "a.pth", content_of()), content_of()
    content["hidden_states"] = [
        {f"base_model.model.{name}": state for name, state in row.items()} for row in content["hidden_states"]
    ]
    assert run_import(a, "--destination", saved(tmp_path / "b.pth", content)).status == 0


@pytest.mark.parametrize(
    ("module", "width", "message"),
    [
        ("model.layers.31", 64, "states of width 64 at 'lm.block.31', but --model .* has blocks 0–2 of width 64"),
        ("model.layers.1", 48, "states of width 48 at 'lm.block.1', but --model .* has blocks 0–2 of width 64"),
    ],
)
def test_states_of_another_model(run_import: Run, tmp_path: Path, module: str, width: int, message: str) -> None:
    rows = [{module: torch.zeros(1, width)}]
    error = run_import(saved(tmp_path / "a.pth", {"hidden_states": rows, "image": ["1.jpg"]})).error
    assert re.search(f"a.pth has {message}; give the model that the states are of", error)


def test_two_modules_of_one_site(run_import: Run, tmp_path: Path) -> None:
    rows = [{name: torch.zeros(1, 64) for name in ("model.layers.1", "language_model.model.layers.1")}]
    error = run_import(saved(tmp_path / "a.pth", {"hidden_states": rows, "image": ["1.jpg"]})).error
    assert "modules 'model.layers.1' and 'language_model.model.layers.1' are both 'lm.block.1'" in error


def test_flags(cli: Run, tiny: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", content_of())
    assert "--model is needed" in cli("import-features", path, "--out", "store").error
    assert "original" in cli("import-features", "--model", tiny, "--out", "store").error
    flags = ("--model", tiny, "--out", tmp_path / "store")
    assert "single words" in cli("import-features", path, *flags, "--word", "hot dog").error
    assert cli("import-features", *flags, "--original", path).status == 0
    done = cli("import-features", "--help")
    assert "no code in a file is executed" in " ".join(done.out.split())


# --- the analysis -----------------------------------------------------------------------------------------


def fitters(out: Path) -> list[object]:
    arguments: list[object] = []
    for variant in ("original", "destination"):
        options = {
            "site": "lm.block.2",
            "selector": "token_of_interest:dog",
            "variant": variant,
            "dictionary": "KMeans",
            "dictionary.n_concepts": 4,
            "grounding.candidates": 60,
            "out": out / variant,
        }
        arguments += ["--trainer.callbacks+=DictionaryFitter"]
        arguments += [f"--trainer.callbacks.{key}={value}" for key, value in options.items()]
    return arguments


@pytest.fixture
def import_pair(run_import: Run, tmp_path: Path) -> ImportPair:
    """Import two files, the second of some pictures; gives for each file id → state that counts."""

    def run(numbers: list[int]) -> list[dict[str, Tensor]]:
        random.Random(1).shuffle(numbers)
        contents = [content_of(list(range(50))), content_of(numbers, seed=1)]
        # The fine-tuned model says the word of other pictures too.
        contents[1]["token_of_interest_mask"] = torch.tensor([n % 5 != 0 for n in numbers])
        a, b = (saved(tmp_path / f"{name}.pth", content) for name, content in zip("ab", contents, strict=True))
        done = run_import(a, "--destination", b, "--word", "dog")
        assert done.status == 0, done.err
        return [dict(zip(*expected(content, BLOCK), strict=True)) for content in contents]

    return run


@pytest.mark.parametrize("pictures", [range(50), range(5, 60)], ids=["same pictures", "some others"])
def test_dictionaries_and_shift_are_those_of_the_files(
    cli: Run, import_pair: ImportPair, tmp_path: Path, pictures: range
) -> None:
    rows = import_pair(list(pictures))
    out = tmp_path / "out"
    done = cli(
        "predict", *QUIET, "--model=Replay", "--data=StoredFeatures", f"--data.folder={tmp_path / 'store'}",
        *fitters(out),
        "--trainer.callbacks+=ShiftMeter",
        f"--trainer.callbacks.original={out / 'original'}",
        f"--trainer.callbacks.destination={out / 'destination'}",
        f"--trainer.callbacks.out={out / 'shift'}",
        "--trainer.callbacks.grounding={candidates: 60, words: 5}",
        "--trainer.callbacks.options={permutations: 19, resamples: 9, word_draws: 19, seeds: 0}",
    )  # fmt: skip
    fitted = [KMeans(n_concepts=4).fit(torch.stack(list(each.values()))) for each in rows]
    for variant, states, reference in zip(("original", "destination"), rows, fitted, strict=True):
        found = load_dictionary(out / variant / "dictionary.safetensors")
        torch.testing.assert_close(found.dictionary, reference.dictionary)
        summary = json.loads((out / variant / "concepts.json").read_text())
        assert summary["states"] == len(states)
        assert any(summary["words"])
    assert done.status == 0, done.err
    common = [name for name in rows[0] if name in rows[1]]
    assert 0 < len(common) < min(map(len, rows))
    A, B = (torch.stack([each[name] for name in common]) for each in rows)
    expected_shift = concept_shift(A, B, fitted[0].assign(A), 4)
    shift = load_shift(out / "shift" / "shift.safetensors")[0]
    torch.testing.assert_close(shift.vectors, expected_shift.vectors)
    assert torch.equal(shift.counts, expected_shift.counts)


def test_a_dictionary_of_another_destination_is_refused(cli: Run, import_pair: ImportPair, tmp_path: Path) -> None:
    out, store = tmp_path / "out", tmp_path / "store"
    replay = ("predict", *QUIET, "--model=Replay", "--data=StoredFeatures", f"--data.folder={store}")
    meter = [
        "--trainer.callbacks+=ShiftMeter",
        f"--trainer.callbacks.original={out / 'original'}",
        f"--trainer.callbacks.destination={out / 'destination'}",
        f"--trainer.callbacks.out={out / 'shift'}",
    ]
    import_pair(list(range(50)))
    assert cli(*replay, *fitters(out)).status == 0
    shutil.rmtree(store)
    import_pair(list(range(49)))
    assert f"{out / 'destination'}: its dictionary is of another model" in cli(*replay, *meter).error
    assert not (out / "shift").exists()


@pytest.mark.parametrize("variant", ["original", "destination"])
def test_explain_with_a_dictionary_of_imported_states(
    cli: Run,
    import_pair: ImportPair,
    shapes: Path,
    tmp_path: Path,
    variant: str,
) -> None:
    """The prompt is not in the files; of the destination they have the states, but not the model."""
    import_pair(list(range(50)))
    out = tmp_path / "out"
    store = f"--data.folder={tmp_path / 'store'}"
    assert cli("predict", *QUIET, "--model=Replay", "--data=StoredFeatures", store, *fitters(out)).status == 0
    picture = next(shapes.rglob("*.jpg"))
    options = ("--image", picture, "--dictionary", out / variant)
    assert "with --prompt" in cli("explain", *options).error
    prompted = ("--prompt", "Describe the picture.", "--selector", "answer_mean")
    if variant == "original":
        assert cli("explain", *options, *prompted).status == 0
    else:
        assert "lack 'destination'; give it with --destination" in cli("explain", *options, *prompted).error
