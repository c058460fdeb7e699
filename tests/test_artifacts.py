"""Artifacts: exact round trips, all or nothing, and every way a file can be wrong."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conceptshift.concepts import KMeans, content_hash, load_artifact, load_dictionary, save_artifact

TENSORS = {
    "vectors": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "half": torch.tensor([1.0, 2.5]).bfloat16(),
    "counts": torch.tensor([1, 0, 5]),
    "empty": torch.tensor([False, True]),
    "scalar": torch.tensor(2.0),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "none": torch.zeros(0, 4),
}
METADATA = {
    "model": "toy ü",
    "site": "lm.block.3",
    "seed": 3,
    "alpha": 0.1,
    "words": ["a", None],
    "deep": {"x": True},
}


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "artifact.safetensors"
    digest = save_artifact(path, "shift", TENSORS, METADATA)
    tensors, metadata = load_artifact(path, "shift")
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name
    assert digest == content_hash(TENSORS) == content_hash(tensors)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_tensors_that_share_memory_are_stored(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    save_artifact(tmp_path / "a.safetensors", "shift", {"all": base, "part": base[1:3]}, {})
    assert load_artifact(tmp_path / "a.safetensors", "shift")[0]["part"].tolist() == [1, 2]


def test_loaded_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_artifact(path, "shift", {"x": torch.ones(1000)}, {})
    tensors, _ = load_artifact(path, "shift")
    path.write_bytes(bytes(path.stat().st_size))
    assert tensors["x"].sum() == 1000


def test_hash_depends_on_names_shapes_dtypes_and_values_only() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    digest = content_hash({"x": x, "y": x})
    assert digest == content_hash({"y": x.clone(), "x": x.T.contiguous().T})
    different = (
        {"x": x},
        {"x": x, "z": x},
        {"x": x, "y": x.reshape(4)},
        {"x": x, "y": x.view(torch.int32)},
        {"x": x, "y": x.T},
    )
    assert len({digest, *map(content_hash, different)}) == 6


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "artifact.safetensors"
    save_artifact(path, "shift", {"x": torch.zeros(2)}, {"version": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match=r"nothing was changed: No space left on device") as raised:
        save_artifact(path, "shift", {"x": torch.ones(2)}, {"version": 2})
    monkeypatch.undo()
    assert raised.value.errno == errno.ENOSPC
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    tensors, metadata = load_artifact(path, "shift")
    assert tensors["x"].tolist() == [0, 0]
    assert metadata == {"version": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["artifact.safetensors"]


def test_interruption_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_artifact(tmp_path / "artifact.safetensors", "shift", {"x": torch.zeros(2)}, {})
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"could not write .*artifact\.safetensors"):
        save_artifact(tmp_path / "file" / "artifact.safetensors", "shift", {}, {})


def test_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "artifact.safetensors"
    for value in (1.0, 2.0):
        save_artifact(path, "shift", {"x": torch.tensor([value])}, {})
    assert load_artifact(path, "shift")[0]["x"].tolist() == [2.0]


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), torch.ones(2), Path("x")])
def test_metadata_must_be_json(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match=r"metadata of .*artifact\.safetensors must be JSON"):
        save_artifact(tmp_path / "artifact.safetensors", "shift", {}, {"key": value})
    assert not list(tmp_path.iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def truncate_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def make_text(path: Path) -> None:
    path.write_text("not safetensors at all, but long enough to look like a header")


def make_foreign(path: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(2)}, path, metadata={"format": "pt"})


def make_bare(path: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(2)}, path)


def break_metadata(path: Path) -> None:
    safetensors.torch.save_file({"x": torch.ones(2)}, path, metadata={"conceptshift": "{"})


def drop_hash(path: Path) -> None:
    text = '{"kind": "shift", "metadata": {}}'
    safetensors.torch.save_file({"x": torch.ones(2)}, path, metadata={"conceptshift": text})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated or no safetensors"),
        (truncate_header, "truncated or no safetensors"),
        (empty, "truncated or no safetensors"),
        (make_text, "truncated or no safetensors"),
        (flip_last_byte, "do not have the recorded content hash"),
        (make_foreign, "of another program"),
        (make_bare, "of another program"),
        (break_metadata, "metadata is no JSON"),
        (drop_hash, "its metadata has no 'content_hash'"),
        (Path.unlink, "there is no such file"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "artifact.safetensors"
    save_artifact(path, "shift", TENSORS, METADATA)
    damage(path)
    with pytest.raises(ValueError, match=message) as raised:
        load_artifact(path, "shift")
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_other_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "artifact.safetensors"
    save_artifact(path, "steering_vector", TENSORS, METADATA)
    with pytest.raises(ValueError, match=r"must hold the artifact 'shift', but it holds 'steering_vector'"):
        load_artifact(path, "shift")
    with pytest.raises(ValueError, match=r"must hold the artifact 'dictionary'"):
        load_dictionary(path)


def test_class_of_a_dictionary_comes_from_the_table(tmp_path: Path) -> None:
    path = tmp_path / "dictionary.safetensors"
    KMeans(n_concepts=2).fit(torch.eye(3)).save(path, {})
    tensors, metadata = load_artifact(path, "dictionary")
    assert metadata["class"] == "KMeans"
    save_artifact(path, "dictionary", tensors, {**metadata, "class": "os.system"})
    with pytest.raises(ValueError, match=r"of class 'os\.system', known are .*KMeans.*SemiNMF"):
        load_dictionary(path)
