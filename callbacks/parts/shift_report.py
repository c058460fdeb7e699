"""What is written of a measured shift: `shift.json`, `trajectory.json`, vectors, figures, and TensorBoard's view."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ...concepts import ConceptDictionary, ConceptShift, ShiftSignificance, correlation
from ...datamodules.stored_features import FeatureStore
from ...records.files import write_json
from ...records.provenance import KEY
from .figure_style import SIGNIFICANT
from .figures import tensorboard
from .numbers import log_numbers
from .run_description import provenance_of
from .shift_figures import (
    project_shifts,
    recovery_figure,
    samples_figure,
    save_figures,
    trajectory_figure,
    words_figure,
)
from .shift_measure import LEVEL, Moved, ShiftMeasure, ShiftOptions, mean_interval
from .trajectory import point, trajectory

_PER_CONCEPT = (
    "recovery_original", "recovery_shifted", "recovery_gain", "image_recovery_original", "image_recovery_shifted",
    "cosine_original", "cosine_shifted", "delta_cosine", "delta_cosine_normalised",
    "l2_original", "l2_shifted", "delta_l2", "delta_l2_normalised",
)  # fmt: skip
_OF_SHIFT = ("consistency", "pairwise_cosine", "magnitude", "mean_magnitude")
_OF_SEVERAL = ("consistency", "pairwise_cosine")
# What a concept without a shift has all the same.
_BEFORE = ("recovery_original", "image_recovery_original", "cosine_original", "l2_original")


def write_shift(
    out: Path,
    measure: ShiftMeasure,
    destination: ConceptDictionary,
    checkpoints: Mapping[str, Moved],
    store: FeatureStore,
    trainer: L.Trainer,
    name: str | None = None,
) -> dict[str, Any]:
    """Test the shift to the last checkpoint, and write it; of several checkpoints their trajectory too.

    Args:
        out: Folder to write.
        measure: How shifts are measured.
        destination: Dictionary of the last checkpoint.
        checkpoints: Name → the original's concepts shifted to this checkpoint, in the order of training.
        store: The states.
        trainer: Its loggers take every number, and TensorBoard figures and words.
        name: What the shift is called there; by default as the folder.

    Returns:
        What `shift.json` holds.
    """
    shift_name = name or out.name
    last, moved = list(checkpoints.items())[-1]
    about = {
        KEY: provenance_of(store.metadata, seed=measure.options.seed),
        "dictionary_hashes": {
            "original": measure.original.content_hash,
            "destination": destination.content_hash,
        },
        "method": type(measure.original).__name__,
        "site": measure.site,
        "selector": measure.selector,
        "grounding": asdict(measure.grounding),
        "grounding_hashes": measure.grounding.hashes(),
    }
    significance = measure.tested(moved)
    summary = {
        **about,
        "original": measure.original.metadata["variant"],
        "destination": last,
        **summarise(moved, significance, measure.options),
        **measure.other_seeds(destination, moved),
    }
    # What an earlier run left, and this one may not write.
    (out / "trajectory.json").unlink(missing_ok=True)
    shutil.rmtree(out / "figures", ignore_errors=True)
    figures = {"words": words_figure(summary), "recovery": recovery_figure(summary), "samples": _samples(moved)}
    summary["figures"] = save_figures(figures, out)
    moved.shift.save(
        out / "shift.safetensors",
        {"site": measure.site, "selector": measure.selector, "destination": last, "features": store.metadata},
    )
    write_json(out / "shift.json", summary)
    points = [point(last, 0, moved, moved)]
    if len(checkpoints) > 1:
        path = {**about, **trajectory(measure, checkpoints, significance)}
        points = path["points"]
        figures["trajectory"] = trajectory_figure(path)
        path["figures"] = save_figures({"trajectory": figures["trajectory"]}, out)
        write_json(out / "trajectory.json", path)
    for seen in points:
        show_point(trainer, shift_name, seen)
    if (writer := tensorboard(trainer)) is not None:
        for figure, drawn in figures.items():
            writer.add_figure(f"shift/{shift_name}/{figure}", drawn)
    tests, means = summary["tests"]["magnitude"], summary["means"]
    rank_zero_info(
        f"{out}: {tests['significant']} of {tests['concepts']} concepts shift; of their words, "
        f"{means['recovery_original']:.0f} % are those of {last}, {means['recovery_shifted']:.0f} % when shifted"
    )
    return summary


def show_point(trainer: L.Trainer, name: str, seen: Mapping[str, Any]) -> None:
    """Log one checkpoint of a trajectory: a number a concept and measure; and to TensorBoard its words as text.

    Args:
        trainer: The trainer.
        name: Name of the shift, and what is shown of it.
        seen: What `trajectory` says of the checkpoint, or a part of it.
    """
    step = seen["step"]
    numbers = {f"shift/{name}/{measure}": mean for measure, mean in seen["means"].items()}
    for row in seen["concepts"]:
        of_concept = {measure: row[measure] for measure in seen["means"] if row[measure] is not None}
        tag = f"shift/{name}/concept_{row['concept']:02d}"
        numbers |= {f"{tag}/{measure}": value for measure, value in of_concept.items()}
    log_numbers(trainer, numbers, step)
    writer = tensorboard(trainer)
    if writer is None:
        return
    words = "\n".join(f"| {row['concept']} | {' '.join(row['words_shifted'])} |" for row in seen["concepts"])
    writer.add_text(f"shift/{name}/words", f"| concept | words |\n|---|---|\n{words}", step)


def _samples(moved: Moved) -> Any:
    """Figure of the shifts of single samples."""
    delta = moved.pairs.destination - moved.pairs.original
    points, concepts, arrows, explained = project_shifts(
        delta, moved.assignment, moved.shift.vectors, moved.pairs.samples
    )
    return samples_figure(points, concepts, arrows, explained, [" ".join(of[:3]) for of in moved.words.original])


def summarise(moved: Moved, significance: ShiftSignificance, options: ShiftOptions) -> dict[str, Any]:
    """What is reported of a shift; an empty concept has nothing for what depends on a shift.

    Args:
        moved: What was measured.
        significance: Intervals and tests, those of words among them.
        options: How it was measured.
    """
    shift, found = moved.shift, moved.found
    adjusted = significance.adjusted()
    tested = ~significance.untested
    of_shift = {name: getattr(shift, name)[kept] for name in _OF_SHIFT if bool((kept := _defined(shift, name)).any())}
    return {
        "alpha": options.alpha,
        "average": options.average,
        "matching": options.matching,
        "pairs": len(moved.assignment),
        "samples": moved.pairs.n_samples,
        "unpaired": moved.pairs.unpaired,
        "empty_concepts": shift.empty.nonzero().flatten().tolist(),
        "untested_concepts": significance.untested.nonzero().flatten().tolist(),
        "level": LEVEL,
        "permutations": options.permutations,
        "resamples": options.resamples,
        "word_draws": options.word_draws,
        "means": {**found.means(), **{name: float(values.double().mean()) for name, values in of_shift.items()}},
        "intervals": {
            **found.intervals(LEVEL, options.resamples, options.seed),
            **{name: mean_interval(values, options) for name, values in of_shift.items()},
        },
        "correlations": {name: _correlated(moved, name, options) for name in _OF_SHIFT},
        "tests": {
            test: {"significant": int((p[tested] <= SIGNIFICANT).sum()), "concepts": int(tested.sum())}
            for test, p in adjusted.items()
        },
        "concepts": [_row(moved, k, significance, adjusted) for k in range(len(tested))],
    }


def _defined(shift: ConceptShift, measure: str) -> Tensor:
    """Concepts that have a measure, [K], bool: one sample alone is no more consistent than another."""
    return shift.counts > (1 if measure in _OF_SEVERAL else 0)


def _correlated(moved: Moved, measure: str, options: ShiftOptions) -> dict[str, Any] | None:
    """How a measure of the shift goes with what it recovers."""
    kept = _defined(moved.shift, measure)
    x, gain = getattr(moved.shift, measure)[kept], moved.found.recovery_gain[kept]
    found = correlation(x, gain, LEVEL, options.resamples, options.seed)
    return None if found is None else asdict(found)


def _row(moved: Moved, k: int, significance: ShiftSignificance, adjusted: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is reported of one concept of the original."""
    empty = bool(moved.shift.empty[k])
    matched = int(moved.found.matching[k])
    values: dict[str, Tensor] = {
        **{name: getattr(moved.found, name) for name in _PER_CONCEPT},
        **{name: getattr(moved.shift, name) for name in _OF_SHIFT},
    }
    undefined = {name for name in _OF_SHIFT if not bool(_defined(moved.shift, name)[k])}
    undefined |= {name for name in _PER_CONCEPT if empty and name not in _BEFORE}
    single, untested = int(moved.shift.counts[k]) < 2, bool(significance.untested[k])
    p = {} if untested else {test: float(value[k]) for test, value in significance.p.items()}
    return {
        "concept": k,
        "samples": int(moved.shift.counts[k]),
        "matched": matched,
        "words_original": moved.words.original[k],
        "words_shifted": [] if empty else moved.words.shifted[k],
        "words_destination": moved.words.destination[matched],
        "images_original": moved.pictures.original[k],
        "images_shifted": [] if empty else moved.pictures.shifted[k],
        "images_destination": moved.pictures.destination[matched],
        **{name: None if name in undefined else float(value[k]) for name, value in values.items()},
        "intervals": {} if single else {name: value[k].tolist() for name, value in significance.intervals.items()},
        "too_few_samples": untested,
        "p": p,
        "p_adjusted": {test: float(adjusted[test][k]) for test in p},
    }
