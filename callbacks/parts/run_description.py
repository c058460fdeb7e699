"""What a run is: what makes its states and answers what they are, and its results tell."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from ...datamodules.base import PictureDataModule
from ...datamodules.stored_features import Row
from ...lightning_modules import FeatureExtraction, Inspection, SteeringStep
from ...lightning_modules.backbone.destinations import ORIGINAL
from ...lightning_modules.base import BackboneModule
from ...records.provenance import Provenance, coverage, data_coverage, made_now, versions
from ..steerer import Steerer

# Stage of Lightning → the data module's, and the Trainer's options that leave batches of it out.
_STAGES = {
    TrainerFn.FITTING: ("fit", ("limit_train_batches", "overfit_batches")),
    TrainerFn.VALIDATING: ("validate", ("limit_val_batches",)),
    TrainerFn.TESTING: ("test", ("limit_test_batches",)),
    TrainerFn.PREDICTING: ("predict", ("limit_predict_batches",)),
}
# What an extraction adds, which says nothing of what is made from its states.
_OF_THE_STORE = ("command", "date", "versions", "sites", "site_patterns", "selectors", "variants")


def describe_run(trainer: L.Trainer, module: FeatureExtraction) -> Row:
    """What an extraction depends on, as far as it is known: before the model is loaded, from its files."""
    return {
        **describe(trainer, module),
        "site_patterns": module.site_patterns,
        "selectors": [selector.name for selector in module.selectors],
        "variants": list(module.variants),
        "answers": module.answers,
        "steering": [step.describe() for step in _steps(trainer)],
    }


def describe_inspection(trainer: L.Trainer, module: Inspection) -> Row:
    """What the answers of an inspection depend on."""
    return {
        **describe(trainer, module),
        "variants": list(module.variants),
        "steering": [step.describe() for step in module.steering],
    }


def describe_probe(
    trainer: L.Trainer, module: BackboneModule, data: PictureDataModule, samples: int, site: str, selector: str
) -> Row:
    """What the states of a probe set depend on.

    Args:
        trainer: Trains the model.
        module: The model.
        data: Where the probe set is from.
        samples: How many samples it has at most.
        site: Where they are read.
        selector: At which positions.
    """
    return {
        **describe(trainer, module, data.describe("predict", samples)),
        "probed": samples,
        "checkpoints": {},
        "checkpoint_hashes": {},
        "sites": [site],
        "selectors": [selector],
        "variants": [ORIGINAL],
        "answers": "target",
    }


def describe(trainer: L.Trainer, module: BackboneModule, data: Row | None = None, stage: str | None = None) -> Row:
    """What states and answers of a run depend on: the model, the data, precision, limits, versions; and its seed.

    Args:
        trainer: The trainer.
        module: What it runs.
        data: What the data are, if not those of the trainer.
        stage: Whose samples count, if not the trainer's: `validate` while a model is trained.
    """
    read = getattr(trainer, "datamodule", None)
    if data is None:
        data = read.describe(stage or stage_of(trainer)) if isinstance(read, PictureDataModule) else {}
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        **module.describe(),
        "precision": str(trainer.precision),
        "data": data,
        "seed": None if seed is None else int(seed),
        "limits": limits(trainer),
        "versions": versions(),
    }


def stage_of(trainer: L.Trainer) -> str:
    """Which samples of the data module the trainer runs: `fit`, `validate`, `test` or `predict`."""
    return _STAGES[_function(trainer)][0]


def limits(trainer: L.Trainer) -> dict[str, int | float]:
    """The Trainer's options that leave something of the run out, and what they were set to."""
    return left_out(vars(trainer), _function(trainer))


def left_out(options: Mapping[str, Any], function: TrainerFn) -> dict[str, int | float]:
    """Those of the Trainer's options that leave something of a run out.

    Args:
        options: Name → value.
        function: What the Trainer does.
    """
    # It sets the others too.
    names = ("fast_dev_run",) if options.get("fast_dev_run") else _STAGES[function][1]
    # 1 is one batch, 1.0 is all of them.
    return {
        name: value
        for name in names
        if (value := options.get(name)) is not None
        and not (name == "overfit_batches" and value == 0)
        and not (isinstance(value, float) and value == 1.0 and name != "overfit_batches")
    }


def provenance(trainer: L.Trainer, module: BackboneModule, stage: str | None = None) -> Provenance:
    """What made a result of this run, steering included; see `describe`."""
    return {
        **describe(trainer, module, stage=stage),
        "steering": [step.describe() for step in _steps(trainer)],
        **made_now(),
    }


def provenance_of(metadata: Mapping[str, Any], **more: Any) -> Provenance:
    """What made a result that was computed from stored states.

    Args:
        metadata: Of the feature store.
        **more: What else the result depends on.
    """
    kept = {name: value for name, value in metadata.items() if name not in _OF_THE_STORE}
    extracted = {name: metadata[name] for name in ("command", "date", "versions") if name in metadata}
    return {**kept, "coverage": data_coverage(metadata), "extracted": extracted, **more, **made_now()}


def covered(trainer: L.Trainer, samples: int, skipped: int = 0, stage: str | None = None) -> str:
    """How much of the data a result of this run is of: `1,200 of 1,500 (limit)`.

    Args:
        trainer: The trainer.
        samples: How many samples the result is of.
        skipped: How many had no readable picture.
        stage: As for `describe`.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, PictureDataModule):
        return coverage(samples, None)
    of = data.available(stage or stage_of(trainer))
    reasons = ["limit"] if data.limit is not None and (of is None or min(data.limit, of) < of) else []
    reasons += [*limits(trainer), *(["unreadable pictures"] if skipped else [])]
    return coverage(samples, of, reasons)


def _function(trainer: L.Trainer) -> TrainerFn:
    return trainer.state.fn or TrainerFn.PREDICTING


def _steps(trainer: L.Trainer) -> list[SteeringStep]:
    """What steers this run, in order."""
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    return [step for callback in callbacks if isinstance(callback, Steerer) for step in callback.vectors]
