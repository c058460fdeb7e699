"""What made a result: kept in it, and compared by whoever reads it with what it is used for."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Provenance = dict[str, Any]
"""What made a result: model and destination, data and prompt, generation, seed, limits, versions, command, date."""

KEY = "provenance"
"""Where a result has it."""

_PACKAGES = ("conceptshift", "torch", "transformers", "peft", "lightning")
# What tells nothing of what was made.
_INCIDENTAL = {"command", "date", "seed"}
# Where something is, and what says whether it is the same: known by that, its place does not matter.
_PLACES = {
    "model_id": "weights_hash",
    "revision": "weights_hash",
    "commit": "weights_hash",
    "adapter": "adapter_hash",
    "checkpoints": "checkpoint_hashes",
}
# Longer values are not spelled out in errors.
_SHORT = 90

_command: ContextVar[str | None] = ContextVar("command", default=None)


@contextmanager
def commanded(arguments: Sequence[str]) -> Iterator[None]:
    """Within the context, results name this command of `conceptshift`."""
    token = _command.set(shlex.join(["conceptshift", *arguments]))
    try:
        yield
    finally:
        _command.reset(token)


def command() -> str:
    """What the user has called."""
    return _command.get() or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def made_now() -> Provenance:
    """What every result has, whatever it is: versions, command, and date."""
    return {"versions": versions(), "command": command(), "date": datetime.now(UTC).isoformat(timespec="seconds")}


@cache
def versions() -> dict[str, str]:
    """Versions of this package, of those whose work results depend on, and of Python."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a folder, without being installed
            found[name] = "unknown"
    return found


def mismatch(found: Mapping[str, Any], wanted: Mapping[str, Any], keys: Iterable[str] | None = None) -> str | None:
    """The first thing that two descriptions of runs do not have in common, with both values.

    Places (of a model, an adapter, a folder of data) do not count where hashes tell what is in them; nor do the command
    and the date.

    Args:
        found: What made a result.
        wanted: What would make this run's; what it does not know yet, it leaves out.
        keys: Look at these only.

    Returns:
        A text for an error; nothing where all is the same.
    """
    for key in wanted if keys is None else keys:
        before, now = found.get(key), wanted.get(key)
        if key in _INCIDENTAL or before == now or _is_place(key, found, wanted):
            continue
        if key == "data" and isinstance(before, dict) and isinstance(now, dict):
            if _same_data(before, now):
                continue
            # What was chosen says more than how many samples it gave.
            counts = ("hash", "samples", "of")
            chosen = [name for name in {**before, **now} if name not in counts and before.get(name) != now.get(name)]
            return (
                _told(f"data.{chosen[0]}", before.get(chosen[0]), now.get(chosen[0]))
                if chosen
                else _told("data.hash", before.get("hash"), now.get("hash"))
            )
        return _told(key, before, now)
    return None


def _same_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return before.get("hash") is not None and before.get("hash") == now.get("hash")


def _is_place(key: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether what is at a place is known by its content in both."""
    hashes = [side.get(_PLACES.get(key, "")) for side in (found, wanted)]
    return all(one and (not isinstance(one, dict) or all(one.values())) for one in hashes)


def _told(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        inner = next(name for name in sorted({*before, *now}) if before.get(name) != now.get(name))
        return _told(f"{key}.{inner}", before.get(inner), now.get(inner))
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        place = next(place for place, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1])
        return _told(f"{key}.{place}", before[place], now[place])
    return f"`{key}` was {_short(before)}, and is {_short(now)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}…"


def coverage(samples: int, of: int | None, reasons: Iterable[str] = ()) -> str:
    """How much of the data something is of: `1,200 of 1,500 (limit)`.

    Args:
        samples: How many samples it is of.
        of: How many there are, if that is known.
        reasons: Why it is not all of them.
    """
    why = ", ".join(reasons)
    total = "" if of is None or of == samples else f" of {of:,}"
    return f"{samples:,}{total}{f' ({why})' if why and (total or of is None) else ''}"


def data_coverage(made: Mapping[str, Any]) -> str:
    """How much of its data a result is of, as what made it tells; empty where it does not."""
    data, limits = made.get("data") or {}, made.get("limits") or {}
    samples, of = (data.get(name) for name in ("samples", "of")) if isinstance(data, dict) else (None, None)
    if not isinstance(samples, int):
        return ""
    reasons = [*(["limit"] if data.get("limit") is not None else []), *limits]
    return coverage(samples, of if isinstance(of, int) else None, reasons)
