"""Steering vectors as GGUF files, the format of llama.cpp's control vectors.

llama.cpp adds the tensor `direction.N` to what its block N, counted from 0, puts out, at every position: it is the
vector of the site `lm.block.N`. Block 0 cannot be steered there. See `common_control_vector_load_one` in llama.cpp's
common/common.cpp and `llama_adapter_cvec` in src/llama-adapter.cpp; repeng writes the same format.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._optional import require
from .artifacts import content_hash, write_bytes

_ARCHITECTURE = "controlvector"
_MODEL_HINT = f"{_ARCHITECTURE}.model_hint"
# One JSON string with the content hash and the metadata.
_OURS = "conceptshift.artifact"
_SITE = re.compile(r"lm\.block\.(\d+)")
_TENSOR = re.compile(r"direction\.(\d+)")


def write_gguf(path: Path, vectors: Mapping[str, Tensor], metadata: Mapping[str, Any], model_hint: str) -> None:
    """Write steering vectors as a control vector; the whole file appears, or nothing changes.

    Args:
        path: file to write.
        vectors: site → [D], float32; the sites are `lm.block.N` with N ≥ 1.
        metadata: JSON values.
        model_hint: llama.cpp's name of the model's architecture, e.g. `llama`; it is not checked when the file is used.

    Raises:
        ValueError: a vector cannot be a control vector, or gguf is not installed.
        OSError: the file cannot be written.
    """
    directions = {f"direction.{_block(path, site, vector)}": vector for site, vector in vectors.items()}
    widths = sorted({vector.shape[-1] for vector in vectors.values()})
    if len(widths) > 1:
        raise ValueError(f"{path}: llama.cpp takes vectors of one width, got {widths}; export the sites one by one")
    require(("gguf",), "gguf")
    from gguf import GGUFWriter

    text = json.dumps({"content_hash": content_hash(directions), "metadata": dict(metadata)}, allow_nan=False)
    with tempfile.TemporaryDirectory() as folder:
        working = Path(folder) / "vectors.gguf"
        writer = GGUFWriter(working, _ARCHITECTURE)
        writer.add_string(_MODEL_HINT, model_hint)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))
        writer.add_string(_OURS, text)
        for name, vector in directions.items():
            writer.add_tensor(name, vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_bytes(path, working.read_bytes())


def read_gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a control vector, ours or one that llama.cpp or repeng wrote.

    Args:
        path: file to read.

    Returns:
        site → [D], float32, and the metadata; of a foreign file that is its `model_hint`.

    Raises:
        ValueError: the file is missing, damaged, or no control vector, or gguf is not installed.
    """
    if not path.is_file():
        raise ValueError(f"{path} must be a GGUF file, but there is no such file")
    require(("gguf",), "gguf")
    try:
        tensors, fields = _parse(path)
    # What the library meets in a damaged file, according to where the damage is.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged or no GGUF file ({error}); make it anew") from error
    if fields["general.architecture"] != _ARCHITECTURE:
        raise ValueError(f"{path} must hold a control vector, but it holds {fields['general.architecture']!r}")
    vectors = {f"lm.block.{_number(path, name)}": _vector(path, name, data) for name, data in tensors.items()}
    if fields[_OURS] is None:
        return vectors, {"model_hint": fields[_MODEL_HINT]}
    try:
        ours = json.loads(fields[_OURS])
        intact = ours["content_hash"] == content_hash({name: torch.from_numpy(tensors[name]) for name in tensors})
        metadata = dict(ours["metadata"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: its metadata is not what was written ({error}); make it anew") from error
    if not intact:
        raise ValueError(f"{path} is damaged: its tensors do not have the recorded content hash; make it anew")
    return vectors, metadata


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors as numpy arrays by name, and the fields that are looked at; None for one that is not there."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Refuses to read behind the end, where the library takes what there is and goes on to a forged count."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("the file ends too early")
            return super()._get(offset, dtype, count, override_order)

    reader = Reader(path)
    found = {name: reader.get_field(name) for name in ("general.architecture", _MODEL_HINT, _OURS)}
    fields = {name: None if field is None else field.contents() for name, field in found.items()}
    # Copies, because the originals are mapped to a file that may be replaced later.
    return {tensor.name: np.array(tensor.data) for tensor in reader.tensors}, fields


def _block(path: Path, site: str, vector: Tensor) -> int:
    """The block N of a site `lm.block.N` whose vector llama.cpp can add."""
    match = _SITE.fullmatch(site)
    if match is None:
        raise ValueError(
            f"{path}: llama.cpp adds vectors to what blocks of the language model put out, and {site!r} is no "
            "lm.block.N; make the vector at a block"
        )
    if int(match[1]) == 0:
        raise ValueError(
            f"{path}: llama.cpp cannot steer 'lm.block.0' (it has no direction.0); choose later blocks (--site)"
        )
    if vector.ndim != 1:
        raise ValueError(
            f"{path}: llama.cpp adds one vector to all states, and that of {site!r} has {len(vector)}, one for each "
            "concept; make a vector with another method than `fine`"
        )
    return int(match[1])


def _number(path: Path, name: str) -> int:
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise ValueError(f"{path} must hold tensors direction.N, but it has {name!r}")
    return int(match[1])


def _vector(path: Path, name: str, data: Any) -> Tensor:
    if data.ndim != 1 or data.dtype not in (np.float32, np.float16):
        raise ValueError(
            f"{path}: {name} must be one vector in float32 or float16, got {data.dtype} {list(data.shape)}; export it "
            "unquantised"
        )
    return torch.from_numpy(data).float()
