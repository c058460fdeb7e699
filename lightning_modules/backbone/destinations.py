"""Names of destinations and series of them, and whether they are there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ...records.paths import located, user_name
from .identity import ADAPTER_CONFIG, base_note

ORIGINAL, DESTINATION = "original", "destination"
TRAINED = "default"
"""An adapter that is being trained, by the name that PEFT gives one."""
_STEP = re.compile(r"step-(\d+)$")
# Folders that say what they hold, not which run they are of.
_GENERAL_NAMES = ("adapter", "model")


def step_of(variant: str) -> int | None:
    """Training step of a checkpoint of a series (`step-000060`), or nothing."""
    match = _STEP.fullmatch(variant)
    return int(match[1]) if match else None


def run_of(checkpoint: Path) -> str | None:
    """Which training a checkpoint of a series is of, if it says so."""
    return base_note(checkpoint).get("run")


def step_name(step: int) -> str:
    """Name of the checkpoint of a training step."""
    return f"step-{step:06d}"


def name_destinations(destination: str | Sequence[str]) -> dict[str, str]:
    """Give each destination a name.

    Args:
        destination: An adapter or whole model (folder or hub id), several, or the folder of a series, which holds
            `step-000060`, `step-000120`, …

    Returns:
        Name → folder or hub id, in order; `destination` for a single one, else the names of the folders.

    Raises:
        ValueError: There is none, two have the same name, or a series has a gap.
    """
    paths = [user_name(path) for path in ([destination] if isinstance(destination, str) else destination)]
    if isinstance(destination, str) and (steps := _steps(Path(paths[0]))):
        return {path.name: str(path) for path in steps}
    if len(paths) == 1:
        return {DESTINATION: paths[0]}
    named: dict[str, str] = {}
    for path in paths:
        parts = [part for part in Path(path).parts if part not in _GENERAL_NAMES]
        name = (parts or [path])[-1].replace(".", "_")  # PEFT's names have no dots
        if name in named or name == ORIGINAL:
            raise ValueError(
                f"--model.init_args.destination: {path!r} would be called {name!r}, as another is; rename its folder"
            )
        named[name] = path
    if not named:
        raise ValueError("--model.init_args.destination: an empty list; name a checkpoint, or leave it out")
    return named


def _steps(folder: Path) -> list[Path]:
    """The checkpoints of a series, in the order of training.

    Raises:
        ValueError: One is missing between others: the last may come early, where training ended.
    """
    runs: dict[str, Path] = {}
    for path in sorted(folder.glob("step-*")):
        if step_of(path.name) and (run := run_of(path)):
            runs.setdefault(run, path)
    if len(runs) > 1:
        (one, first), (other, second) = list(runs.items())[:2]
        raise ValueError(
            f"{folder}: {first.name} is of one training ({one}), {second.name} of another ({other}); export the series "
            "again, or list the checkpoints of one"
        )
    # Step 0 would be the original.
    found = {step: path for path in folder.glob("step-*") if (step := step_of(path.name))}
    steps = sorted(found)
    if len(steps) > 1:
        regular = [0, *steps[:-1]]
        apart = min(after - before for before, after in pairwise(regular))
        expected = range(apart, steps[-1], apart)
        if missing := sorted(set(expected) - set(steps)):
            raise ValueError(
                f"{folder}: a series every {apart} steps without {step_name(missing[0])}; export it again, or list its "
                "checkpoints to take them as they are"
            )
    return [found[step] for step in steps]


def check_checkpoint(path: str) -> None:
    """Check that a local checkpoint is there and whole, before anything is loaded.

    Raises:
        ValueError: It is neither an adapter nor a model, or both.
    """
    folder = Path(located(path, "--model.init_args.destination"))
    if not folder.is_dir():
        return  # a hub id, which only loading can check
    adapter = is_adapter(str(folder)) and any(folder.glob("adapter_model.*"))
    weights = [file for pattern in ("model*.safetensors*", "pytorch_model*.bin*") for file in folder.glob(pattern)]
    model = (folder / "config.json").is_file() and bool(weights)
    if adapter != model:
        return
    if model:
        state = "both a PEFT adapter and a model; remove the one that is not meant"
    else:
        state = "neither a PEFT adapter nor a model, or not whole; give what ModelExport wrote"
    raise ValueError(f"--model.init_args.destination {path!r}: {state}")


def is_adapter(path: str) -> bool:
    """Whether a folder has a PEFT adapter."""
    return (Path(path) / ADAPTER_CONFIG).is_file()
