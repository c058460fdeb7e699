"""`conceptshift report`: write the HTML report of a run folder."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..datamodules.files import write_whole
from ..datamodules.images import BadImageError, read_image
from .command import run_command
from .report_view import (
    METHODS,
    VARIANTS,
    Json,
    Picture,
    answers_view,
    captions_view,
    color_parts,
    dictionaries_view,
    duration,
    facts_view,
    fixed,
    headline_view,
    scores_view,
    shift_view,
)

_THUMBNAIL = 128  # pixels, twice the size at which most are shown
_RESULTS_KEYS = ("captioning", "vqa", "concepts", "shift", "seconds", "versions", "skipped")


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write one self-contained page that shows a run to somebody who was not there.

    Reads `results.json` and what else the folder holds of `samples.json`, `concepts/<variant>-<method>/concepts.json`,
    `shift/<method>/shift.json`, `captions-<variant>.json` and `answers-<variant>.json`; a section whose file is
    missing is left out.

    Args:
        folder: The run folder.
        out: File to write; `report.html` in the folder by default.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: The folder has no `results.json`.
        ValueError: A file is no JSON, or not what its name says.
    """
    view = _view(folder)
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"fixed": fixed, "duration": duration, "color_parts": color_parts}
    page = environment.get_template("report.html.jinja").render(view)
    out = folder / "report.html" if out is None else out
    write_whole(out, lambda working: working.write_text(page, encoding="utf-8"))
    return out


class Thumbnails:
    """Reads pictures for embedding, each once.

    Args:
        folder: Where relative paths start, if they do not start in the working folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=85)
        return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode('ascii')}"


def _view(folder: Path) -> Json:
    """Everything the template shows, section by section."""
    results = _results(folder / "results.json")
    samples = _read(folder / "samples.json") or {}
    shifts = {method: _read(folder / "shift" / method / "shift.json", "concepts") for method in METHODS}
    captions = {variant: _predictions(folder / f"captions-{variant}.json") for variant in VARIANTS}
    answers = {variant: _predictions(folder / f"answers-{variant}.json") for variant in VARIANTS}
    dictionaries = {
        (method, variant): _read(folder / "concepts" / f"{variant}-{method}" / "concepts.json", "words")
        for method in METHODS
        for variant in VARIANTS[:2]
    }
    pictures = Thumbnails(folder)
    return {
        "facts": facts_view(results, shifts, captions, answers),
        "headline": headline_view(results),
        "scores": scores_view(results),
        "shifts": [shift_view(METHODS[method], shift, pictures) for method, shift in shifts.items() if shift],
        "dictionaries": dictionaries_view(results, dictionaries),
        "captions": captions_view(captions, samples, pictures),
        "answers": answers_view(answers, samples, pictures),
        "results": results,
    }


def _results(path: Path) -> Json:
    """`results.json`, with every part there."""
    results = _read(path)
    if results is None:
        raise FileNotFoundError(f"{path}: no such file; --folder must be one that `conceptshift demo` has finished")
    for key in _RESULTS_KEYS:
        results[key] = {} if results.get(key) is None else results[key]
        if not isinstance(results[key], dict):
            raise ValueError(f"{path}: {key!r} must be an object, got {results[key]!r:.40}; run the demo again")
    return results


def _predictions(path: Path) -> Json:
    content = _read(path, "predictions")
    return {} if content is None else dict(content["predictions"])


def _read(path: Path, *keys: str) -> dict[str, Any] | None:
    """A JSON object that has `keys`, or nothing where there is no such file."""
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
    return content


def report(folder: str, out: str | None = None) -> None:
    """Write a run's report: one HTML file that needs nothing else.

    Args:
        folder: The run folder, with its `results.json`.
        out: File to write; `report.html` in the folder by default.
    """
    print(write_report(Path(folder), None if out is None else Path(out)))


def run(args: Sequence[str]) -> None:
    """Run the command."""
    run_command(report, args)
