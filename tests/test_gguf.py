"""Steering vectors as control vectors of llama.cpp."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conceptshift.concepts import SteeringVectors, _optional, load_steering_vectors
from gguf import GGUFReader, GGUFWriter

Run = Callable[..., Any]


@pytest.fixture
def vectors() -> SteeringVectors:
    """Vectors of two blocks, with controls."""
    generator = torch.Generator().manual_seed(0)
    made = {site: torch.randn(33, generator=generator) for site in ("lm.block.3", "lm.block.12")}
    return SteeringVectors(made, {site: vector[None] for site, vector in made.items()}, {"to": ["no", 1], "é": None})


def foreign(path: Path, tensors: dict[str, Any], architecture: str = "controlvector", **fields: Any) -> Path:
    """What repeng writes."""
    writer = GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, value in fields.items():
        writer.add_array(name, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_round_trip_is_exact(tmp_path: Path, vectors: SteeringVectors) -> None:
    path = tmp_path / "new" / "steer.gguf"
    vectors.save_gguf(path, "llama")
    loaded = load_steering_vectors(path)
    torch.testing.assert_close(loaded.vectors, vectors.vectors, rtol=0, atol=0)
    assert loaded.metadata == vectors.metadata
    assert loaded.shuffled == {}
    assert [file.name for file in path.parent.iterdir()] == ["steer.gguf"]


def test_the_file_is_what_llama_cpp_reads(tmp_path: Path, vectors: SteeringVectors) -> None:
    vectors.save_gguf(tmp_path / "steer.gguf", "qwen2")
    reader = GGUFReader(tmp_path / "steer.gguf")

    def field(name: str) -> Any:
        found = reader.get_field(name)
        assert found is not None
        return found.contents()

    assert field("general.architecture") == "controlvector"
    assert field("controlvector.model_hint") == "qwen2"
    assert field("controlvector.layer_count") == 2
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert set(found) == {"direction.3", "direction.12"}
    for name, tensor in found.items():
        assert tensor.tensor_type.name == "F32"
        assert tensor.shape.tolist() == [33]
        wanted = vectors.vectors[name.replace("direction", "lm.block")]
        assert np.array_equal(tensor.data, wanted.numpy())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_files_of_others(tmp_path: Path, dtype: Any) -> None:
    tensors = {f"direction.{layer}": np.arange(6, dtype=dtype) + layer for layer in (1, 2, 31)}
    loaded = load_steering_vectors(foreign(tmp_path / "x.gguf", tensors, tokens=["a", "b"], numbers=[1, 2, 3]))
    assert list(loaded.vectors) == ["lm.block.1", "lm.block.2", "lm.block.31"]
    assert loaded.vectors["lm.block.31"].tolist() == [31, 32, 33, 34, 35, 36]
    assert loaded.vectors["lm.block.1"].dtype == torch.float32
    assert loaded.metadata == {"model_hint": "mistral"}


def test_what_llama_cpp_cannot_add(tmp_path: Path) -> None:
    out = tmp_path / "steer.gguf"
    one = torch.ones(4)
    for made, message in (
        ({"lm.block.0": one}, r"cannot steer 'lm.block.0' \(it has no direction.0\); choose later blocks"),
        ({"lm.norm": one}, "'lm.norm' is no lm.block.N; make the vector at a block"),
        ({"vision.block.2": one}, "'vision.block.2' is no lm.block.N"),
        ({"lm.block.1": torch.ones(2, 4)}, "that of 'lm.block.1' has 2, one for each concept"),
        ({"lm.block.1": one, "lm.block.2": torch.ones(5)}, r"vectors of one width, got \[4, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            SteeringVectors(made, {}, {}).save_gguf(out, "llama")
    assert not out.exists()


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with pytest.raises(ValueError, match=r"x\.gguf must be a GGUF file, but there is no such file"):
        load_steering_vectors(path)
    vector = {"direction.1": np.ones(4, np.float32)}
    for tensors, architecture, message in (
        (vector, "llama", "must hold a control vector, but it holds 'llama'"),
        ({"blk.1": np.ones(4, np.float32)}, "controlvector", "must hold tensors direction.N, but it has 'blk.1'"),
        ({"direction.1": np.ones((2, 4), np.float32)}, "controlvector", r"direction.1 must be one vector.*\[2, 4\]"),
        ({"direction.1": np.ones(4, np.int8)}, "controlvector", "in float32 or float16, got int8"),
        ({"direction.1": np.full(4, np.nan, np.float32)}, "controlvector", "must be finite"),
        ({}, "controlvector", "at least one site"),
    ):
        with pytest.raises(ValueError, match=message):
            load_steering_vectors(foreign(path, tensors, architecture))
    for content in (b"", b"GGUF", b"no such thing" * 10):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.gguf is damaged or no GGUF file"):
            load_steering_vectors(path)


def test_damage_is_found(tmp_path: Path, vectors: SteeringVectors) -> None:
    path = tmp_path / "x.gguf"
    vectors.save_gguf(path, "llama")
    whole = path.read_bytes()
    for end in (*range(0, len(whole) - 128, 37), len(whole) - 64):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"x\.gguf"):
            load_steering_vectors(path)
    for at in (8, 16, 24, 40, whole.index(b"content_hash"), whole.index(b"direction.3") + 11, len(whole) - 128):
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.gguf"):
            load_steering_vectors(path)


@pytest.mark.parametrize("kind", [0, 8], ids=["bytes", "strings"])
def test_a_forged_count_takes_neither_time_nor_memory(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "x.gguf"
    # A header with one field, an array of 2^60 entries that are not there.
    field = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, kind, 2**60)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + field)
    with pytest.raises(ValueError, match="the file ends too early"):
        load_steering_vectors(path)


def test_without_gguf(tmp_path: Path, vectors: SteeringVectors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_optional, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'gguf not found: pip install "conceptshift\[gguf\]"'):
        vectors.save_gguf(tmp_path / "x.gguf", "llama")


def test_the_command(cli: Run, tmp_path: Path, vectors: SteeringVectors) -> None:
    vectors.save(tmp_path / "x.safetensors")
    done = cli("export-vector", "--vector=x.safetensors", "--out=x.gguf", "--model_hint=qwen2")
    assert done.status == 0, done.err
    assert "x.gguf: 2 vectors" in done.out
    torch.testing.assert_close(load_steering_vectors("x.gguf").vectors, vectors.vectors, rtol=0, atol=0)
    assert b"qwen2" in Path("x.gguf").read_bytes()
    assert "ends in .gguf" in cli("export-vector", "--vector=x.safetensors", "--out=x.bin").error
    assert "nowhere.safetensors" in cli("export-vector", "--vector=nowhere.safetensors", "--out=x.gguf").error
