"""Reads hidden states that XL-VLMs saved with `torch.save`, without executing any code that a file may hold.

The layout, one entry a sample (N of them): `hidden_states`, dicts of module name → state [1, 1, D] or [1, D]; `image`,
paths, each possibly in a list of its own; and, where they are there, `model_predictions`, texts likewise, and
`token_of_interest_mask`, booleans [N] or N booleans. Other keys are ignored.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import reprlib
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

_SAVE_AGAIN = "where you trust it, load it and save its tensors, lists, dicts and strings again with torch.save"


@dataclass(frozen=True, eq=False)
class ForeignFeatures:
    """The rows of one file, one a sample.

    Attributes:
        path: The file.
        sha256: Hash of its content.
        images: Path of each row's picture [N].
        texts: What the model said of each [N]; empty where the file does not tell.
        chosen: Rows with a state that counts: those of `token_of_interest_mask`, or all.
        widths: Module → D.
        states: Module → state of each row [N], any shape of D values; mapped from the file where that is possible.
    """

    path: Path
    sha256: str
    images: list[str]
    texts: list[str]
    chosen: list[int]
    widths: dict[str, int]
    states: list[Mapping[str, Tensor]]

    @classmethod
    def read(cls, path: Path) -> ForeignFeatures:
        """Read and check everything but the values of the states.

        Raises:
            ValueError: The file is missing, unsafe, damaged or of another layout, or no row counts.
        """
        content = _load(path)
        if not isinstance(content, dict):
            raise ValueError(
                f"{path}: holds a {type(content).__name__}, expected a dict with 'hidden_states' and 'image'"
            )
        states = _entries(path, content, "hidden_states")
        images = [_string(path, "image", row, value) for row, value in enumerate(_entries(path, content, "image"))]
        said = _entries(path, content, "model_predictions") if "model_predictions" in content else [""] * len(states)
        texts = [_string(path, "model_predictions", row, value) for row, value in enumerate(said)]
        _check_length(path, "image", images, states)
        _check_length(path, "model_predictions", texts, states)
        chosen = list(range(len(states)))
        if "token_of_interest_mask" in content:
            mask = _mask(path, content["token_of_interest_mask"], states)
            chosen = [row for row in chosen if mask[row]]
        if not chosen:
            raise ValueError(
                f"{path}: 'token_of_interest_mask' is true for none of {len(states)} samples; extract another word"
            )
        if "" in images:
            raise ValueError(f"{path}: 'image' of row {images.index('')} is empty; expected the path of a picture")
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path, sha256, images, texts, chosen, _widths(path, states), states)

    def stack(self, module: str, rows: Sequence[int]) -> Tensor:
        """States [n, D] of some rows, in the precision of the file.

        Raises:
            ValueError: One is not finite.
        """
        stacked = torch.stack([self.states[row][module].detach().reshape(-1) for row in rows])
        bad = (~stacked.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            row = rows[bad[0]]
            raise ValueError(
                f"{self.path}: 'hidden_states' of row {row} ({self.images[row]}) at {module!r} are not finite; extract "
                "again, in float32 or bfloat16"
            )
        return stacked


def sample_ids(files: Sequence[ForeignFeatures]) -> list[list[str]]:
    """Ids that tell which rows of several files are of the same picture.

    Args:
        files: The files.

    Returns:
        For each file the id of each row: the picture's file name, or its path as it is where file names repeat. Where
        rows of one name are in folders of different names, a warning tells.

    Raises:
        ValueError: A picture is in several rows of a file.
    """
    names = [[PurePosixPath(image).name for image in file.images] for file in files]
    if all(len(set(of_file)) == len(of_file) for of_file in names):
        _warn_of_other_folders(files, names)
        return names
    for file in files:
        rows_of: dict[str, int] = {}
        for row, image in enumerate(file.images):
            if rows_of.setdefault(image, row) != row:
                raise ValueError(
                    f"{file.path}: rows {rows_of[image]} and {row} are both of {image}; they cannot be told apart and "
                    "could not be paired; extract each picture once"
                )
    return [file.images for file in files]


def _warn_of_other_folders(files: Sequence[ForeignFeatures], names: Sequence[Sequence[str]]) -> None:
    """Rows of the same file name may be of different pictures, as in `train2014/1.jpg` and `val2014/1.jpg`."""
    first = dict(zip(names[0], files[0].images, strict=True))
    for file, of_file in zip(files[1:], names[1:], strict=True):
        pairs = [(first[name], image) for name, image in zip(of_file, file.images, strict=True) if name in first]
        odd = [pair for pair in pairs if len({PurePosixPath(image).parent.name for image in pair} - {""}) > 1]
        if odd:
            rank_zero_warn(
                f"{file.path}: {len(odd)} of {len(pairs)} rows are paired by file name with rows of {files[0].path} "
                f"though their folders differ, e.g. {odd[0][0]} and {odd[0][1]}; if these are different pictures, "
                "extract both files from the same folder"
            )


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a .pth file that XL-VLMs wrote")
    try:
        zipped = zipfile.is_zipfile(path)  # torch before 1.6 wrote another format, which cannot be mapped
        compressed = zipped and _is_compressed(path)
        if not compressed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what torch warns of is refused below
                return torch.load(path, weights_only=True, map_location="cpu", mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"it holds {named[1]}" if named else "it is damaged, or holds more than tensors, lists, dicts and strings"
        )
        raise ValueError(f"{path}: refused, because {what}; nothing was executed; {_SAVE_AGAIN}") from error
    except Exception as error:
        # Each of torch's readers fails in ways of its own on what is cut off, OSError and IndexError among them.
        raise ValueError(
            f"{path}: truncated, damaged, or not written by torch.save{_reason(error)}; copy it again"
        ) from error
    # torch.save never compresses; how much memory it would take, the size of the file does not tell.
    raise ValueError(f"{path}: is compressed; {_SAVE_AGAIN}")


def _is_compressed(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def _reason(error: Exception) -> str:
    """The first line of an error in brackets; nothing where it is a bare number or that of a system call."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f" ({first})" if re.search(r"[A-Za-z]", first) and not first.startswith("[Errno") else ""


def _entries(path: Path, content: Mapping[Any, Any], key: str) -> list[Any]:
    """A list with an entry a sample."""
    if key not in content:
        there = reprlib.repr([name for name in content if isinstance(name, str)])
        raise ValueError(f"{path}: no {key!r} among its keys, {there}; give a file of features that XL-VLMs wrote")
    entries = content[key]
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError(f"{path}: {key!r} must be a list with an entry a sample, got {_described(entries)}")
    return list(entries)


def _check_length(path: Path, key: str, values: Sequence[Any] | Tensor, states: Sequence[Any]) -> None:
    if len(values) != len(states):
        raise ValueError(
            f"{path}: {len(values)} entries in {key!r}, but {len(states)} in 'hidden_states'; expected one a sample"
        )


def _string(path: Path, key: str, row: int, value: Any) -> str:
    only = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    if not isinstance(only, str):
        raise ValueError(
            f"{path}: {key!r} of row {row} must be a string or a list of one string, got {_described(value)}"
        )
    return only


def _mask(path: Path, mask: Any, states: Sequence[Any]) -> list[bool]:
    where = f"{path}: 'token_of_interest_mask'"
    of_tensor = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 1 and _is_stored(mask)
    if not of_tensor and not isinstance(mask, list | tuple):
        raise ValueError(f"{where} must be a boolean tensor [N] or a list of booleans, got {_described(mask)}")
    _check_length(path, "token_of_interest_mask", mask, states)
    if of_tensor:
        return [bool(entry) for entry in mask.tolist()]
    for row, entry in enumerate(mask):
        is_scalar = isinstance(entry, Tensor) and entry.dtype == torch.bool and entry.numel() == 1
        if not is_scalar and not isinstance(entry, bool):
            raise ValueError(f"{where} of row {row} must be one boolean, got {_described(entry)}")
    return [bool(entry) for entry in mask]


def _widths(path: Path, states: Sequence[Any]) -> dict[str, int]:
    """Module → D, which must be the same in every row."""
    widths: dict[str, int] = {}
    for row, modules in enumerate(states):
        where = f"{path}: 'hidden_states' of row {row}"
        if not isinstance(modules, dict) or not modules or not all(isinstance(name, str) for name in modules):
            raise ValueError(f"{where} must be a dict of module name and state, got {_described(modules)}")
        for name, state in modules.items():
            if not _is_state(state):
                raise ValueError(
                    f"{where} at {name!r} must be one dense state [1, 1, D] or [1, D], got {_described(state)}; "
                    "extract the token of interest, or one token of each sample"
                )
        found = {name: state.shape[-1] for name, state in modules.items()}
        widths = widths or found
        if found != widths:
            name = sorted(name for name in found | widths if found.get(name) != widths.get(name))[0]
            raise ValueError(
                f"{where} at {name!r} has width {found.get(name)}, but row 0 has {widths.get(name)}; expected the same "
                "modules in every row"
            )
    return widths


def _is_state(state: Any) -> bool:
    return (
        isinstance(state, Tensor)
        and _is_stored(state)
        and state.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and state.ndim in (2, 3)
        and state.numel() == state.shape[-1] > 0
    )


def _is_stored(value: Tensor) -> bool:
    """Whether every value has its own place in memory: a few bytes can be told to be seen as any number of them."""
    return (
        value.layout is torch.strided
        and value.device.type == "cpu"
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


def _described(value: Any) -> str:
    """What came, for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return (
        f"a {type(value).__name__} of {len(value)}" if isinstance(value, list | tuple | dict) else reprlib.repr(value)
    )
