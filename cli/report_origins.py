"""What made the results of a run folder: told beside them, and compared where they are shown side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..records.provenance import KEY, coverage, mismatch
from .report_files import read_json
from .report_values import VARIANTS, Json

_RESULTS = (
    "concepts.json", "scores.json", "causal.json", "shift.json", "trajectory.json", "sweep.json", "lens.json",
    "ablation.json", "knockout.json", "captions*.json", "answers*.json",
)  # fmt: skip
# What the texts of an original, a destination and a steered model must have in common to be compared.
_COMPARED = ("weights_hash", "dtype", "quantization", "precision", "max_new_tokens")
_DIGITS = 12  # of a hash, as many as git shows


def origins_view(folder: Path) -> list[Json]:
    """One row a result below a folder: which it is, and what made it; those that do not tell are left out."""
    return [_row(path.relative_to(folder).as_posix(), content) for path, content in _results(folder)]


def models_of(rows: list[Json]) -> list[str]:
    """The models that results are of, if there are several."""
    models = list(dict.fromkeys(row["model"] for row in rows if row["model"]))
    return models if len(models) > 1 else []


def check_side_by_side(folder: Path) -> None:
    """Refuse captions or answers of several variants that are not of one model, asked in the same way.

    Raises:
        ValueError: They are not; names both files and both values.
    """
    for kind in ("captions", "answers"):
        paths = [path for variant in VARIANTS if (path := folder / f"{kind}-{variant}.json").is_file()]
        made = {path: found for path in paths if (found := _object((read_json(path) or {}).get(KEY)))}
        for path in list(made)[1:]:
            first = next(iter(made))
            if odd := mismatch(made[first], made[path], _COMPARED):
                raise ValueError(f"{path}: cannot stand beside {first}, which another run made ({odd}); run one again")


def _results(folder: Path) -> Iterator[tuple[Path, Json]]:
    for pattern in _RESULTS:
        for path in sorted(folder.rglob(pattern)):
            content = read_json(path) or {}
            if _object(content.get(KEY)):
                yield path, content


def _row(name: str, content: Json) -> Json:
    made = _object(content[KEY])
    data, limits = _object(made.get("data")), _object(made.get("limits"))
    weights = str(made.get("weights_hash", "")).rpartition(":")[2][:_DIGITS]
    return {
        "name": name,
        "model": " ".join(filter(None, (str(made.get("model_id") or ""), weights))),
        "destinations": _destinations(made),
        "steering": len(made.get("steering") or []),
        "data": " ".join(str(data[key]) for key in ("class", "root", "path", "split") if data.get(key)),
        "coverage": content.get("coverage") or _coverage(data, limits),
        "prompt": str(data.get("prompt") or "").strip(),
        "seed": made.get("seed"),
        "command": str(made.get("command") or ""),
        "date": str(made.get("date") or ""),
    }


def _destinations(made: Json) -> list[str]:
    hashes = dict(_object(made.get("checkpoint_hashes")))
    if made.get("adapter"):
        hashes[str(made["adapter"])] = made.get("adapter_hash")
    return [f"{name} {str(value or '').rpartition(':')[2][:_DIGITS]}".strip() for name, value in hashes.items()]


def _coverage(data: Json, limits: Json) -> str:
    samples, of = data.get("samples"), data.get("of")
    if not isinstance(samples, int):
        return ""
    reasons = [*(["limit"] if data.get("limit") else []), *limits]
    return coverage(samples, of if isinstance(of, int) else None, reasons)


def _object(value: Any) -> Json:
    return value if isinstance(value, dict) else {}
