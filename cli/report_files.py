"""Reads the report's files; what is not as it should be is an error of one line that names file and place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .report_values import Json

Shape = str | list[Any] | dict[str, Any]
"""What a value may be: one of the names below, a list of one shape, or an object, of which keys may be missing or null
that do not end in an exclamation mark."""
NUMBER, TEXT, PAIR, COUNT = "a number", "a text", "two numbers", "a whole number from 0"
NUMBERS = "a number or a list of numbers"
ANY = "*"
"""The only key of an object in which every value has the same shape."""


def read_json(path: Path, *keys: str, shape: Shape | None = None) -> Json | None:
    """A JSON object, or nothing where there is no such file.

    Args:
        path: The file.
        keys: What must be in it, a list or an object each.
        shape: What its values must be.

    Raises:
        ValueError: It is no JSON, no object, lacks a key, or a value has another shape.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: malformed JSON ({error}); run what writes it again, or remove it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}; run what writes it again")
    for key in keys:
        if not isinstance(content.get(key), dict | list):
            raise ValueError(f"{path}: no {key!r} in it; run what writes it again, or remove it")
    if shape is not None and (found := misfit(content, shape)):
        raise ValueError(f"{path}: {found}; run what writes it again, or remove it")
    return content


def read_texts(path: Path, runs: Sequence[str]) -> dict[str, dict[str, str]]:
    """Run → id → text of these runs of a sweep's `samples.parquet`, or nothing where there is no such file.

    Raises:
        ValueError: It is no such file, or lacks a run.
    """
    if not path.is_file():
        return {}
    try:
        table = pq.read_table(path, columns=["run", "sample_id", "text"], filters=[("run", "in", runs)])
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: no texts of a sweep ({reason}); run what writes it again, or remove it") from error
    texts: dict[str, dict[str, str]] = {run: {} for run in runs}
    for row in table.to_pylist():
        texts[row["run"]][str(row["sample_id"])] = str(row["text"])
    if missing := [run for run, of_run in texts.items() if not of_run]:
        raise ValueError(
            f"{path}: nothing of the run {missing[0]!r} of the sweep.json beside it; run what writes it again, or "
            "remove it"
        )
    return texts


def misfit(value: Any, shape: Shape, place: str = "") -> str:
    """Where a value is not of a shape, and what it is instead; empty where it is."""
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            return _wrong(place, "an object", value)
        named = [(key.removesuffix("!"), inner) for key, inner in shape.items()]
        inside = [(key, shape[ANY]) for key in value] if ANY in shape else named
        found = (
            misfit(value.get(key), inner, f"{place}.{key}".lstrip("."))
            for key, inner in inside
            if value.get(key) is not None or f"{key}!" in shape
        )
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return _wrong(place, "a list", value)
        found = (misfit(item, shape[0], f"{place}[{number}]") for number, item in enumerate(value))
    else:
        return "" if _FITS[shape](value) else _wrong(place, shape, value)
    return next(filter(None, found), "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


_FITS: dict[str, Callable[[Any], bool]] = {
    NUMBER: _is_number,
    COUNT: lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    TEXT: lambda value: isinstance(value, str),
    PAIR: lambda value: _are_numbers(value) and len(value) == 2,
    NUMBERS: lambda value: _is_number(value) or _are_numbers(value),
}


def _wrong(place: str, expected: str, value: Any) -> str:
    return f"'{place}' must be {expected}, got {value!r:.40}"
