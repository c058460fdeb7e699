"""Artifacts on disk: safetensors with JSON metadata and a content hash, written all or nothing."""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..records.paths import user_path

_HEADER = "conceptshift"


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """Sha256 over the names, dtypes, shapes and bytes of the tensors, whatever their order or device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_artifact(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> str:
    """Write tensors and metadata to one file: the whole file appears, or nothing changes.

    Args:
        path: file to write; missing folders are made, an existing file is replaced.
        kind: what the file holds ("dictionary", "shift", ...); `load_artifact` asks for it again.
        tensors: tensors by name, any shapes and devices.
        metadata: JSON values that say where the tensors come from (model, site, data, seed, ...).

    Returns:
        The content hash of the tensors.

    Raises:
        ValueError: if `metadata` is not JSON.
        OSError: if the file cannot be written (full disk, no permission); no partial file stays.
    """
    path = user_path(path)
    stored = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    digest = content_hash(stored)
    header = {"kind": kind, "content_hash": digest, "metadata": dict(metadata)}
    try:
        text = json.dumps(header, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata of {path} must be JSON with finite numbers: {error}") from error
    write_bytes(path, safetensors.torch.save(stored, metadata={_HEADER: text}))
    return digest


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file: the whole file appears, or nothing changes and an OSError tells why."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        # Same errno, so that callers can still tell a full disk from a missing permission.
        reason = f"could not write {len(data)} bytes, nothing was changed: {error.strerror}"
        raise OSError(error.errno, reason, str(path)) from error


def load_artifact(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_artifact` wrote, on the CPU, and verify it.

    Args:
        path: file to read.
        kind: what the file must hold.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        ValueError: if the file is missing, truncated or altered, no safetensors, or of another kind.
    """
    tensors, header = _read(user_path(path))
    try:
        found, digest, metadata = header["kind"], header["content_hash"], header["metadata"]
    except KeyError as error:
        raise ValueError(f"{path} is damaged: its metadata has no {error}; make it anew") from error
    if found != kind:
        raise ValueError(f"{path} must hold the artifact '{kind}', but it holds '{found}'")
    if content_hash(tensors) != digest:
        raise ValueError(f"{path} is damaged: its tensors do not have the recorded content hash; make it anew")
    return tensors, metadata


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise ValueError(
            f"{path} must be an artifact file, but there is no such file: check the path, or run what writes it first"
        )
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER)
            # Clones, because the originals are mapped to a file that may be replaced later.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); make it anew") from error
    if text is None:
        raise ValueError(f"{path} is a safetensors file of another program: it has no conceptshift metadata")
    try:
        return tensors, json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its metadata is no JSON ({error}); make it anew") from error
