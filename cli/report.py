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
from .report_concepts import dictionary_view
from .report_dictionaries import Fitted, comparison_view, ordered
from .report_samples import answers_view, captions_view, color_parts
from .report_scores import facts_view, headline_view, scores_view
from .report_shift import shift_view
from .report_values import VARIANTS, Json, Picture, duration, figures, fixed

_THUMBNAIL = 128  # pixels, twice the size at which most are shown
_SMALL_THUMBNAIL = 96  # there are hundreds of these
_METHOD_NAMES = {"kmeans": "KMeans", "semi_nmf": "Semi-NMF"}
_RESULTS_KEYS = ("captioning", "vqa", "concepts", "shift", "seconds", "versions", "skipped")


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write one self-contained page that shows a run to somebody who was not there.

    Reads what the folder holds of `results.json`, `samples.json`, `concepts/<name>/concepts.json` with `scores.json`
    and `causal.json` beside it, `shift/<name>/shift.json`, `captions-<variant>.json` and `answers-<variant>.json`; a
    section whose file is missing is left out.

    Args:
        folder: The run folder.
        out: File to write; `report.html` in the folder by default.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: The folder has neither `results.json` nor a dictionary.
        ValueError: A file is no JSON, or not what its name says, or of another dictionary than the one beside it.
    """
    view = _view(folder)
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"fixed": fixed, "figures": figures, "duration": duration, "color_parts": color_parts}
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
        return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode('ascii')}"


def _view(folder: Path) -> Json:
    """Everything the template shows, section by section."""
    fitted = _dictionaries(folder / "concepts")
    results = _results(folder / "results.json", needed=not fitted)
    # Where no dictionary is left, `results.json` still tells something of them.
    dictionaries = fitted or [
        Fitted(name, "", {"words": [], **summary}) for name, summary in results["concepts"].items() if summary
    ]
    samples = _read(folder / "samples.json") or {}
    shifts = {
        path.parent.name: _read(path, "concepts") or {} for path in sorted((folder / "shift").glob("*/shift.json"))
    }
    captions = {variant: _predictions(folder / f"captions-{variant}.json") for variant in VARIANTS}
    answers = {variant: _predictions(folder / f"answers-{variant}.json") for variant in VARIANTS}
    pictures, small = Thumbnails(folder), Thumbnails(folder, _SMALL_THUMBNAIL)
    return {
        "facts": facts_view(results, shifts, captions, answers),
        "headline": headline_view(results),
        "scores": scores_view(results),
        "shifts": [shift_view(_METHOD_NAMES.get(name, name), shift, pictures) for name, shift in shifts.items()],
        "comparison": comparison_view(dictionaries),
        "dictionaries": [dictionary_view(one, small) for one in dictionaries],
        "captions": captions_view(captions, samples, pictures),
        "answers": answers_view(answers, samples, pictures),
        "results": results,
    }


def _results(path: Path, needed: bool) -> Json:
    """`results.json`, with every part there."""
    results = _read(path)
    if results is None and needed:
        raise FileNotFoundError(
            f"{path.parent}: neither results.json nor concepts/*/concepts.json in it; --folder must be one that "
            "`conceptshift demo` has finished, or in whose concepts/ a DictionaryFitter wrote a dictionary"
        )
    results = results or {}
    for key in _RESULTS_KEYS:
        results[key] = {} if results.get(key) is None else results[key]
        if not isinstance(results[key], dict):
            raise ValueError(f"{path}: {key!r} must be an object, got {results[key]!r:.40}; run the demo again")
    return results


def _dictionaries(folder: Path) -> list[Fitted]:
    """Every dictionary below a folder."""
    found = []
    for path in folder.rglob("*/concepts.json"):
        concepts = _read(path, "words") or {}
        scores = _read(path.with_name("scores.json"), "scores", "overlap", "methods", "words")
        causal = _read(path.with_name("causal.json"), "concepts", "left_out")
        if scores and scores["words"].get(scores.get("method")) != concepts["words"]:
            raise ValueError(_stale(path.with_name("scores.json"), "GroundingScorer"))
        for row in causal["concepts"] if causal else ():
            # Without the token of interest, so that they may be fewer.
            if not set(row["words"]) <= set(dict(enumerate(concepts["words"])).get(row["concept"], ())):
                raise ValueError(_stale(path.with_name("causal.json"), "CausalChecker"))
        name = path.parent.relative_to(folder).as_posix()
        found.append(Fitted(name, str(path.parent), concepts, scores, causal))
    return ordered(found)


def _stale(path: Path, callback: str) -> str:
    return f"{path}: of other concepts than the concepts.json beside it; run {callback} again, or remove it"


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
        folder: The run folder, with its `results.json`, or with dictionaries in its `concepts/`.
        out: File to write; `report.html` in the folder by default.
    """
    print(write_report(Path(folder), None if out is None else Path(out)))


def run(args: Sequence[str]) -> None:
    """Run the command."""
    run_command(report, args)
