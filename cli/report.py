"""`conceptshift report`: write the HTML report of a run folder."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..datamodules.images import BadImageError, read_image
from ..records.files import write_whole
from ..records.paths import user_path
from .command import run_command
from .report_concepts import dictionary_view
from .report_dictionaries import Fitted, comparison_view, ordered
from .report_files import read_json, read_texts
from .report_inspection import SHAPES, Inspected, inspection_fault, inspection_view
from .report_origins import check_side_by_side, models_of, origins_view
from .report_samples import answers_view, captions_view, color_parts
from .report_scores import SCORES, facts_view, headline_view, scores_view
from .report_shift import SHIFT, shift_view
from .report_steering import SWEEP, Sweep, steering_view, sweep_fault
from .report_trajectory import TRAJECTORY, trajectory_view
from .report_values import VARIANTS, Json, Picture, duration, figures, fixed, get, interval

_THUMBNAIL = 128  # pixels, twice the size at which most are shown
_SMALL_THUMBNAIL = 96  # there are hundreds of these
_METHOD_NAMES = {"kmeans": "KMeans", "semi_nmf": "Semi-NMF"}
_RESULTS_KEYS = ("captioning", "vqa", "concepts", "shift", "seconds", "versions", "skipped")


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write one self-contained page that shows a run to somebody who was not there.

    Reads what the folder holds of `results.json`, `samples.json`, `concepts/<name>/concepts.json` with `scores.json`
    and `causal.json` beside it, `shift/<name>/shift.json` and `trajectory.json` with their figures,
    every `sweep.json`, `lens.json`, `ablation.json` and `knockout.json` at any depth with its figures,
    `captions-<variant>.json` and `answers-<variant>.json`; a section whose file is missing is left out.

    Args:
        folder: The run folder.
        out: File to write; `report.html` in the folder by default.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: The folder has neither `results.json`, nor a dictionary, a shift, a sweep, or a look inside.
        ValueError: A file is no JSON, or not what its name says, or of another dictionary than the one beside it; or
            texts that are shown side by side are of different models.
    """
    view = _view(folder)
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "fixed": fixed,
        "figures": figures,
        "interval": interval,
        "duration": duration,
        "color_parts": color_parts,
    }
    page = environment.get_template("report.html.jinja").render(view)
    out = folder / "report.html" if out is None else out
    write_whole(out, lambda working: working.write_text(page, encoding="utf-8"))
    return out


class Thumbnails:
    """Reads pictures for embedding, each once.

    Args:
        folder: Where relative paths start, if they do not start in the working folder.
        longest: Longest side, in pixels; smaller pictures keep their size.
    """

    def __init__(self, folder: Path, longest: int = _THUMBNAIL) -> None:
        self.folder = folder
        self.longest = longest
        self._uris: dict[str, str | None] = {}

    def __call__(self, path: str | None, alt: str) -> Picture:
        """A picture as a data URI; none if it cannot be read."""
        if path is None:
            return Picture(None, "no path", alt)
        if path not in self._uris:
            self._uris[path] = self._encode(Path(path))
        return Picture(self._uris[path], Path(path).name, alt)

    def _encode(self, path: Path) -> str | None:
        try:
            picture = read_image(path if path.is_file() else self.folder / path)
        except BadImageError:
            return None
        picture.thumbnail((self.longest, self.longest))
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=85)
        return f"data:image/jpeg;base64,{_base64(jpeg.getvalue())}"


def _view(folder: Path) -> Json:
    """Everything the template shows, section by section."""
    fitted = _dictionaries(folder / "concepts")
    shifts = _shifts(folder / "shift")
    sweeps, inspected = _sweeps(folder), _inspected(folder)
    results = _results(folder / "results.json", needed=not (fitted or shifts or sweeps or inspected))
    # Where no dictionary is left, `results.json` still tells something of them.
    dictionaries = fitted or [
        Fitted(name, "", {"words": [], **summary}) for name, summary in results["concepts"].items() if summary
    ]
    check_side_by_side(folder)
    origins = origins_view(folder)
    samples = _samples(folder)
    captions = {variant: _predictions(folder / f"captions-{variant}.json") for variant in VARIANTS}
    answers = {variant: _predictions(folder / f"answers-{variant}.json") for variant in VARIANTS}
    pictures, small = Thumbnails(folder), Thumbnails(folder, _SMALL_THUMBNAIL)
    return {
        "facts": facts_view(results, {one.name: one.shift or one.trajectory for one in shifts}, captions, answers),
        "headline": headline_view(results),
        "scores": scores_view(results),
        "shifts": [one.head | shift_view(one.shift, pictures) for one in shifts if one.shift],
        "trajectories": [one.head | trajectory_view(one.trajectory, pictures) for one in shifts if one.trajectory],
        "steering": steering_view(sweeps, samples, pictures),
        "inspected": inspection_view(inspected),
        "comparison": comparison_view(dictionaries),
        "dictionaries": [dictionary_view(one, small) for one in dictionaries],
        "captions": captions_view(captions, samples, pictures),
        "answers": answers_view(answers, samples, pictures),
        "results": results,
        "origins": origins,
        "models": models_of(origins),
    }


def _results(path: Path, needed: bool) -> Json:
    """`results.json`, with every part there."""
    results = read_json(path, shape=SCORES)
    if results is None and needed:
        raise FileNotFoundError(
            f"{path.parent}: neither results.json nor concepts/*/concepts.json nor shift/*/shift.json or "
            "trajectory.json nor a sweep.json, lens.json, ablation.json or knockout.json in it; --folder must be one "
            "that `conceptshift demo` has finished, in whose concepts/ or shift/ a DictionaryFitter, ShiftMeter or "
            "ShiftMonitor wrote, or with what a sweep, LensScorer, AblationMeter or KnockoutMeter wrote"
        )
    results = results or {}
    for key in _RESULTS_KEYS:
        results[key] = {} if results.get(key) is None else results[key]
        if not isinstance(results[key], dict):
            raise ValueError(f"{path}: {key!r} must be an object, got {results[key]!r:.40}; run the demo again")
    return results


@dataclass(frozen=True)
class Shift:
    """What is known of a shift: what `shift.json` and `trajectory.json` hold, and the folder that both lie in."""

    name: str
    folder: Path
    shift: Json | None
    trajectory: Json | None

    @property
    def head(self) -> Json:
        """Its title, and its figures as data URIs."""
        figures = (get(self.shift, "figures") or {}) | (get(self.trajectory, "figures") or {})
        uris = {name: _figure(self.folder / path) for name, path in figures.items() if path}
        return {"name": self.name, "title": _METHOD_NAMES.get(self.name, self.name), "figures": uris}


def _shifts(folder: Path) -> list[Shift]:
    """Every shift below a folder; those over a training, whose last is often known from others, come after them."""
    found = {path.parent for name in ("shift", "trajectory") for path in folder.rglob(f"{name}.json")}
    return [
        Shift(
            path.relative_to(folder).as_posix() if path != folder else folder.name,
            path,
            read_json(path / "shift.json", "concepts", shape=SHIFT),
            read_json(path / "trajectory.json", "points", shape=TRAJECTORY),
        )
        for path in sorted(found, key=lambda path: ((path / "trajectory.json").is_file(), path))
    ]


def _samples(folder: Path) -> Json:
    """Picture and prompt of every sample that is known, of the run and of its sweeps."""
    paths = {folder / "samples.json", *(path.parent.parent / "samples.json" for path in folder.rglob("sweep.json"))}
    return {name: sample for path in sorted(paths) for name, sample in (read_json(path) or {}).items()}


def _sweeps(folder: Path) -> list[Sweep]:
    """Every sweep's target below a folder."""
    found = []
    for path in sorted(folder.rglob("sweep.json")):
        content = read_json(path, "runs", shape=SWEEP) or {}
        if fault := sweep_fault(content):
            raise ValueError(f"{path}: {fault}; run what writes it again, or remove it")
        figures = {name: _figure(path.parent / "figures" / f"{name}.png") for name in ("pareto", "map")}
        name = path.parent.relative_to(folder).as_posix() if path.parent != folder else folder.name
        sweep = Sweep(name, content, figures)
        texts = read_texts(path.with_name("samples.parquet"), [sweep.unsteered["name"], sweep.best["name"]])
        found.append(replace(sweep, texts=texts))
    return found


def _inspected(folder: Path) -> list[Inspected]:
    """Every result of looking inside pictures, below a folder."""
    found = []
    for kind, shape in SHAPES.items():
        for path in sorted(folder.rglob(f"{kind}.json")):
            content = read_json(path, "variants", shape=shape) or {}
            if fault := inspection_fault(content):
                raise ValueError(f"{path}: {fault}; run what writes it again, or remove it")
            figures = {one.stem: _figure(one) for one in (path.parent / "figures").glob("*.png")}
            name = path.parent.relative_to(folder).as_posix() if path.parent != folder else folder.name
            found.append(Inspected(kind, name, content, figures))
    return found


def _figure(path: Path) -> str | None:
    """A figure as a data URI: the PNG or the SVG beside it, whichever is lighter; none where both are gone."""
    kinds = {path.with_suffix(".png"): "png", path.with_suffix(".svg"): "svg+xml"}
    found = sorted((one for one in kinds if one.is_file()), key=lambda one: one.stat().st_size)
    return f"data:image/{kinds[found[0]]};base64,{_base64(found[0].read_bytes())}" if found else None


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _dictionaries(folder: Path) -> list[Fitted]:
    """Every dictionary below a folder."""
    found = []
    for path in folder.rglob("*/concepts.json"):
        concepts = read_json(path, "words") or {}
        scores = read_json(path.with_name("scores.json"), "scores", "overlap", "methods", "words")
        causal = read_json(path.with_name("causal.json"), "concepts", "left_out")
        for name, callback in (("scores.json", "GroundingScorer"), ("causal.json", "CausalChecker")):
            _check_dictionary(path, concepts, path.with_name(name), callback)
        if scores and scores["words"].get(scores.get("method")) != concepts["words"]:
            raise ValueError(_stale(path.with_name("scores.json"), "GroundingScorer"))
        for row in causal["concepts"] if causal else ():
            # Without the token of interest, so that they may be fewer.
            if not set(row["words"]) <= set(dict(enumerate(concepts["words"])).get(row["concept"], ())):
                raise ValueError(_stale(path.with_name("causal.json"), "CausalChecker"))
        name = path.parent.relative_to(folder).as_posix()
        found.append(Fitted(name, str(path.parent), concepts, scores, causal))
    return ordered(found)


def _check_dictionary(concepts_path: Path, concepts: Json, path: Path, callback: str) -> None:
    """Refuse what was found of another dictionary than the one beside it."""
    known, found = concepts.get("dictionary_hash"), (read_json(path) or {}).get("dictionary_hash")
    if None not in (known, found) and known != found:
        raise ValueError(
            f"{path}: of another dictionary ({found}) than {concepts_path} ({known}); run {callback} again, or "
            "remove it"
        )


def _stale(path: Path, callback: str) -> str:
    return f"{path}: of other concepts than the concepts.json beside it; run {callback} again, or remove it"


def _predictions(path: Path) -> Json:
    content = read_json(path, "predictions")
    return {} if content is None else dict(content["predictions"])


def report(folder: str, out: str | None = None) -> None:
    """Write a run's report: one HTML file that needs nothing else.

    Args:
        folder: The run folder, with its `results.json`, dictionaries in its `concepts/`, shifts in its `shift/`, or a
            sweep's targets.
        out: File to write; `report.html` in the folder by default.
    """
    print(write_report(user_path(folder), None if out is None else user_path(out)))


def run(args: Sequence[str]) -> None:
    """Run the command."""
    run_command(report, args)
