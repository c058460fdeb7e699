"""The folder of a run, and the base of the callbacks that write into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from ...lightning_modules.backbone.destinations import ORIGINAL
from ...records.paths import check_writable, user_path
from .run_description import limits

TRIAL = "-trial"
"""Ending of the places of a run that leaves something out, where a whole one has been."""


def run_folder(trainer: L.Trainer) -> Path | None:
    """The folder of a run (`--out`, or the Trainer's `default_root_dir`); nothing where none was given."""
    folder = str(trainer.default_root_dir)
    return None if folder == os.getcwd() else Path(folder)


def trial_place(place: Path) -> Path:
    """Where a run writes that is not to touch what is at a place."""
    return place.with_name(f"{place.stem}{TRIAL}{place.suffix}")


class RunWriter(Callback):
    """Base of the callbacks that write into the folder of a run, or where they are told to.

    Args:
        told: Where to write instead.
    """

    place: ClassVar[str]
    """Where in the folder of a run it writes; `{name}` stands for its name, `{variant}` for `-destination`."""
    option: ClassVar[str] = "out"
    """Its option that says so."""
    makes: ClassVar[str] = ""
    """What others of its run may ask for: `features`, or a `dictionary`."""

    def __init__(self, told: str | None) -> None:
        self.told = None if told is None else user_path(told)
        # The command line gives the name that it has under `callbacks`.
        self.name: str | None = None
        self._out = self.told

    @property
    def default_name(self) -> str:
        """What stands for a name where it was given none."""
        return type(self).__name__

    @property
    def out(self) -> Path:
        """Where it writes, from `locate` on."""
        if self._out is None:
            raise RuntimeError(f"{type(self).__name__} has no place yet; run it by a Trainer")
        return self._out

    @property
    def writes_at_all(self) -> bool:
        """Whether it has a place, from `locate` on."""
        return self._out is not None

    @property
    def state_key(self) -> str:
        """Several may write in one run."""
        return f"{type(self).__name__}[{self.name or self.told or self.default_name}]"

    def locate(self, trainer: L.Trainer, required: bool = True) -> None:
        """Find where to write, in `setup`.

        What is there from a whole run stays: a run that leaves something out (`fast_dev_run`, `limit_predict_batches`)
        writes beside it.

        Args:
            trainer: The trainer.
            required: Whether it has to write.

        Raises:
            ValueError: Nobody has said where, it cannot be written, or another callback writes there.
        """
        option = f"{self.name or type(self).__name__}.{self.option}"
        place = self.planned(trainer)
        if place is None:
            if required:
                raise ValueError(f"{option}: where to write? Give the run a folder: --out checkpoints/NAME")
            return
        left_out = limits(trainer)
        in_trial = any(part.endswith(TRIAL) for part in place.parts)
        is_there = place.exists()
        if trainer.world_size > 1:
            # Another process may be the first to write there.
            is_there = trainer.strategy.broadcast(is_there)
        if left_out and not in_trial and (is_there or "fast_dev_run" in left_out):
            given = ", ".join(f"--trainer.{name} {value}" for name, value in left_out.items())
            place = trial_place(place)
            rank_zero_warn(f"{option}: {given} leaves something out, so that this run writes to {place} instead")
        check_writable(
            place, option if self.told is not None else f"{option} (--out)", folder=not Path(self.place).suffix
        )
        callbacks: list[Callback] = cast(Any, trainer).callbacks
        for other in callbacks:
            if other is not self and isinstance(other, RunWriter) and other.writes(place):
                raise ValueError(
                    f"{type(other).__name__} and {type(self).__name__} would both write {place}; name them under "
                    f"`callbacks`, or give each its own `{self.option}`"
                )
        self._out = place

    def planned(self, trainer: L.Trainer) -> Path | None:
        """Where it would write in a whole run, if anybody has said so."""
        folder = run_folder(trainer)
        return self.told if self.told is not None or folder is None else folder / self._place()

    def writes(self, place: Path) -> bool:
        """Whether this is where it writes, as far as it is known."""
        return self._out is not None and self._out.resolve() == place.resolve()

    def _place(self) -> str:
        variant = getattr(self, "variant", ORIGINAL)
        return self.place.format(
            name=self.name or self.default_name, variant="" if variant == ORIGINAL else f"-{variant}"
        )
