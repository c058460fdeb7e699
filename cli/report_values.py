"""What the report's parts share: numbers as text, pictures, and values that may be missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
VARIANTS = ("original", "destination", "steered")
VARIANT_NAMES = {"original": "original", "destination": "fine-tuned", "steered": "steered"}


@dataclass(frozen=True)
class Picture:
    """A picture to embed; `uri` is missing where the file cannot be read, and `name` shown in its stead."""

    uri: str | None
    name: str
    alt: str


Pictures = Callable[[str | None, str], Picture]


def fixed(value: Any, digits: int = 1, signed: bool = False) -> str:
    """A number with so many digits; an en dash where there is none."""
    if (number := as_number(value)) is None:
        return "–"
    text = f"{number:{'+' if signed else ''},.{digits}f}"
    return text.lstrip("+-") if not float(text.replace(",", "")) else text.replace("-", "−")


def figures(value: Any, count: int = 3) -> str:
    """A number with at least so many significant digits: `0.0142`, `1.23`, `123`, `123,456`."""
    number = as_number(value)
    return fixed(number, max(0, count - 1 - math.floor(math.log10(abs(number)))) if number else 0)


def interval(bounds: Any, digits: int) -> str:
    """Both ends of an interval, or nothing where there is none: `[0.59, 0.63]`."""
    return f"[{fixed(bounds[0], digits)}, {fixed(bounds[1], digits)}]" if bounds else ""


def chance(p: Any) -> str:
    """A p-value: `0.032`, `< 0.001`."""
    number = as_number(p)
    return "< 0.001" if number is not None and number < 0.001 else fixed(number, 3)


def duration(seconds: Any) -> str:
    """Seconds in words: `1 h 02 min`, `3 min 20 s`, `4.2 s`."""
    number = as_number(seconds)
    if number is None or number < 60:
        return f"{fixed(number)} s" if number is not None else "–"
    minutes, rest = divmod(round(number), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def as_number(value: Any) -> float | None:
    """A finite number, or nothing."""
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if real else None


def verdict(bounds: Any) -> str:
    """`better` or `worse` where the interval of a change leaves 0 out, for what should be high; empty elsewhere."""
    if not bounds or bounds[0] <= 0 <= bounds[1]:
        return ""
    return "better" if bounds[0] > 0 else "worse"


def scaled(value: Any, factor: float) -> Any:
    """A number or both ends of an interval, so many times as large; nothing where there is none."""
    if isinstance(value, list):
        return [factor * end for end in value]
    return None if value is None else factor * value


def difference(after: float | None, before: float | None) -> float | None:
    """How much it rose, if both are known."""
    return None if after is None or before is None else after - before


def get(table: Any, *keys: str) -> Any:
    """What lies under the keys, or nothing."""
    for key in keys:
        table = table.get(key) if isinstance(table, Mapping) else None
    return table
