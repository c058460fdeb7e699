"""What made the results of a run folder: told beside them, and compared where they are shown side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records.provenance import KEY, data_coverage, mismatch
from .report_files import read_json
from .report_values import VARIANTS, Json

_RESULTS = (
    "concepts.json", "scores.json", "causal.json", "shift.json", "trajectory.json", "sweep.json", "lens.json",
    "ablation.json", "knockout.json", "captions*.json", "answers*.json",
)  # fmt: skip
# What the texts of an original, a destination and a steered model must have in common to be compared.
_COMPARED = ("weights_hash", "dtype", "quantization", "precision", "max_new_tokens")
_DIGITS = 12  # of a hash, as many as git shows


@dataclass
class Origin:
    """What made one result, or several alike.

    Attributes:
        names: The results, as paths from the run folder.
        model: The model, with the first digits of its hash.
        facts: Name and value of what is to be told.
    """

    names: list[str]
    model: str
    facts: list[tuple[str, str]]


def origins_view(folder: Path) -> list[Origin]:
    """What made the results below a folder; those that do not tell are left out."""
    found: dict[tuple[tuple[str, str], ...], Origin] = {}
    for path, content in _results(folder):
        name, model, facts = path.relative_to(folder).as_posix(), _model(content), _facts(content)
        # Of results of one run, seconds apart, the first one's date will do.
        alike = tuple(fact for fact in facts if fact[0] != "made")
        found.setdefault(alike, Origin([], model, facts)).names.append(name)
    return list(found.values())


def models_of(origins: list[Origin]) -> list[str]:
    """The models that results are of, if there are several."""
    models = list(dict.fromkeys(origin.model for origin in origins if origin.model))
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


def _model(content: Json) -> str:
    made = _object(content[KEY])
    weights = str(made.get("weights_hash", "")).rpartition(":")[2][:_DIGITS]
    return " ".join(filter(None, (str(made.get("model_id") or ""), weights)))


def _facts(content: Json) -> list[tuple[str, str]]:
    made = _object(content[KEY])
    data = _object(made.get("data"))
    steering = [f"{step.get('file')}, α {step.get('alpha')}" for step in made.get("steering") or [] if _object(step)]
    facts = {
        "model": _model(content),
        "destinations": ", ".join(_destinations(made)),
        "steering": "; ".join(steering),
        "data": " ".join(str(data[key]) for key in ("class", "root", "path", "split") if data.get(key)),
        "samples": content.get("coverage") or data_coverage(made),
        "prompt": str(data.get("prompt") or "").strip(),
        "tokens at most": made.get("max_new_tokens"),
        "seed": made.get("seed"),
        "command": made.get("command"),
        "made": made.get("date"),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _destinations(made: Json) -> list[str]:
    hashes = dict(_object(made.get("checkpoint_hashes")))
    if made.get("adapter"):
        hashes[str(made["adapter"])] = made.get("adapter_hash")
    return [f"{name} {str(value or '').rpartition(':')[2][:_DIGITS]}".strip() for name, value in hashes.items()]


def _object(value: Any) -> Json:
    return value if isinstance(value, dict) else {}
