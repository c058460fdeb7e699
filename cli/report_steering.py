"""The report's steering, made from `sweep.json` files and the texts of their best runs; no files and no HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..metrics.vqa import ANSWER_TYPES
from .report_files import ANY, NUMBER, PAIR, TEXT, Shape
from .report_samples import asked, by_size, spread
from .report_values import Json, Picture, Pictures, as_number, fixed, get, interval, scaled, verdict

_QUALITY = {"elsewhere": "accuracy elsewhere, %", "overall": "VQA accuracy, %"}
_KEPT = 0.9  # of the unsteered quality: what the best run must have at least
_EXAMPLES = 6
_ROWS = 12
_RISES = 4
_NOTHING = "(nothing)"
_WORDS = 6
_CONTROLS = ("random", "shuffled")

_RUN: Shape = {
    **dict.fromkeys(("name!", "kind!", "vector!", "site!", "positions!", "mode!"), TEXT),
    "alpha!": NUMBER,
    "scores!": {ANY: NUMBER},
    "intervals": {ANY: PAIR},
    "changes": {ANY: {"difference!": NUMBER, "interval!": PAIR}},
    "rises": {ANY: NUMBER},
    "selection": {"targets": [TEXT], "gap": NUMBER},
}
SWEEP: Shape = {
    **dict.fromkeys(("task!", "quality!"), TEXT),
    "samples": NUMBER,
    "skipped": {ANY: TEXT},
    "runs!": [_RUN],
}


def sweep_fault(content: Json) -> str:
    """What a `sweep.json` of shape `SWEEP` lacks; empty if nothing."""
    kinds = [run["kind"] for run in content["runs"]]
    if kinds.count("unsteered") != 1 or "steered" not in kinds:
        return "'runs' must have one unsteered run, and at least one steered"
    for run in content["runs"]:
        for measure in ("target", content["quality"]):
            if as_number(run["scores"].get(measure)) is None:
                return f"the run {run['name']!r} has no score {measure!r}"
            if run["kind"] != "unsteered" and get(run, "changes", measure) is None:
                return f"the run {run['name']!r} has no change of {measure!r}"
    return ""


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, scored for one target.

    Attributes:
        name: Its folder, below the run's.
        content: Its `sweep.json`, of shape `SWEEP` and without a fault.
        figures: Name → figure as a data URI.
        texts: Run → id → text, of the unsteered run and the best one; empty if they are not known.
    """

    name: str
    content: Json
    figures: Mapping[str, str | None] = field(default_factory=dict)
    texts: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def quality(self) -> str:
        """Which score is its quality."""
        return str(self.content["quality"])

    @property
    def asks(self) -> bool:
        """Whether it answers questions, rather than writing captions."""
        return bool(self.content["task"] == "vqa")

    @cached_property
    def unsteered(self) -> Json:
        """The unsteered run."""
        return self._of_kind("unsteered")[0]

    @cached_property
    def steered(self) -> list[Json]:
        """The steered runs."""
        return self._of_kind("steered")

    @cached_property
    def bests(self) -> list[Json]:
        """The best run of each vector at each site, positions and mode."""
        groups: dict[tuple[str, ...], list[Json]] = {}
        for run in self.steered:
            groups.setdefault((run["vector"], *_setting(run)), []).append(run)
        return [self.best_of(runs) for runs in groups.values()]

    @cached_property
    def best(self) -> Json:
        """The best of all steered runs."""
        return self.best_of(self.steered)

    def keeps(self, run: Json) -> bool:
        """Whether its quality is not below the unsteered one by more than a tenth of that."""
        return bool(run["scores"][self.quality] >= _KEPT * self.unsteered["scores"][self.quality])

    def best_of(self, runs: Sequence[Json]) -> Json:
        """Of those that keep the quality, the one with the highest target share; without any, the smallest α."""
        return max(runs, key=self.goodness)

    def goodness(self, run: Json) -> tuple[float, ...]:
        """What makes it better than others; ties go to the higher quality and the smaller α."""
        target, quality, alpha = run["scores"]["target"], run["scores"][self.quality], abs(run["alpha"])
        return (1, target, quality, -alpha) if self.keeps(run) else (0, -alpha, target, quality)

    def controls(self, run: Json, kind: str) -> list[Json]:
        """Its controls of a kind."""
        same = (run["vector"], run["alpha"], *_setting(run))
        return [one for one in self._of_kind(kind) if (one["vector"], one["alpha"], *_setting(one)) == same]

    def varies(self, key: str) -> bool:
        """Whether its steered runs differ in this."""
        return len({run[key] for run in self.steered}) > 1

    def how(self, run: Json) -> str:
        """Its positions and mode, as far as steered runs differ in them."""
        return " · ".join(run[key] for key in ("positions", "mode") if run["kind"] == "steered" and self.varies(key))

    def _of_kind(self, kind: str) -> list[Json]:
        return [run for run in self.content["runs"] if run["kind"] == kind]


def _setting(run: Json) -> tuple[str, str, str]:
    return run["site"], run["positions"], run["mode"]


# --- the view ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A number as it is written, with its interval.

    `verdict` is whether it is `better` or `worse` than unsteered, `note` what a control has against its run.
    """

    text: str
    interval: str = ""
    verdict: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A run of the table.

    Attributes:
        vector: What it steers with; `unsteered` for none.
        site: Where.
        how: Positions and mode, as far as runs differ in them.
        alpha: Strength.
        pareto: Whether it is on the Pareto front.
        kept: Whether it keeps the quality.
        best: Whether it is the best of all.
        scores: The value of each measure.
        changes: The change of target and quality from unsteered; none for that itself.
        controls: The target share of each kind of control.
        rises: Answers that rose most, in words.
        clear: The one clear target, if the answers have one.
    """

    vector: str
    site: str
    how: str
    alpha: str
    pareto: bool
    kept: bool
    best: bool
    scores: dict[str, Cell]
    changes: dict[str, Cell]
    controls: dict[str, Cell]
    rises: str
    clear: str


@dataclass(frozen=True)
class Example:
    """What a sample was answered with, unsteered and steered; a picture only where it is known."""

    picture: Picture | None
    prompt: str
    before: str
    after: str

    @property
    def changed(self) -> bool:
        """Whether steering changed it."""
        return self.before != self.after


def steering_view(sweeps: Sequence[Sweep], samples: Json, pictures: Pictures) -> list[Json]:
    """What each target of each sweep came to.

    Args:
        sweeps: The sweeps.
        samples: `caption/<id>` or `question/<id>` → picture and prompt.
        pictures: Reads a picture.
    """
    return [_target(sweep, samples, pictures) for sweep in sweeps]


def _target(sweep: Sweep, samples: Json, pictures: Pictures) -> Json:
    quality = sweep.quality
    types = [kind for kind in ANSWER_TYPES if kind in sweep.unsteered["scores"]] if sweep.asks else []
    formats = {"target": (100, 1), quality: (100, 1) if sweep.asks else (1, 3), "repetition": (100, 1),
               "length": (1, 1), **dict.fromkeys(types, (100, 1))}  # fmt: skip
    leading = sorted(sweep.bests, key=sweep.goodness, reverse=True)[:_ROWS]
    shown = [run for run in sweep.bests if run in leading]
    rows = [_row(sweep, run, formats) for run in (sweep.unsteered, *shown)]
    return {
        "name": sweep.name,
        "title": _title(sweep.content),
        "asks": sweep.asks,
        "facts": _facts(sweep),
        "figures": sweep.figures,
        "quality": quality,
        "quality_name": _QUALITY.get(quality, quality),
        "rows": rows,
        "best": next(row for row in rows if row.best),
        "unsteered": rows[0],
        "controls": [kind for kind in _CONTROLS if any(kind in row.controls for row in rows)],
        "left_out": len(sweep.bests) - len(shown),
        "types": types,
        "comparison": _comparison(sweep, shown),
        "clear_targets": _clear(sweep),
        "steered": len(sweep.steered),
        "examples": _examples(sweep, samples, pictures),
        "skipped": sweep.content.get("skipped") or {},
    }


def _title(content: Json) -> str:
    """What is to be brought about."""
    target, avoid = content.get("target"), content.get("avoid")
    if not isinstance(target, list):
        return f"answers {'other than ' if avoid else ''}“{target}”"
    words = ", ".join(map(str, target[:_WORDS])) + (", …" if len(target) > _WORDS else "")
    return f"captions {'without' if avoid else 'with'} a word of the class ({words})"


def _facts(sweep: Sweep) -> list[tuple[str, str]]:
    """What all its steered runs have in common, and how many there are."""
    names = {"vector": "Vector", "site": "Site", "positions": "Positions", "mode": "Mode"}
    alphas = sorted({run["alpha"] for run in sweep.steered})
    facts = {"Samples": fixed(sweep.content.get("samples"), 0)}
    facts |= {name: sweep.steered[0][key] for key, name in names.items() if not sweep.varies(key)}
    facts |= {"Strengths α": ", ".join(f"{alpha:g}" for alpha in alphas), "Steered runs": str(len(sweep.steered))}
    return list(facts.items())


_Formats = Mapping[str, tuple[int, int]]
"""Measure → what it is multiplied with, and digits."""


def _row(sweep: Sweep, run: Json, formats: _Formats) -> Row:
    steered = run["kind"] == "steered"
    controls = {kind: sweep.controls(run, kind) for kind in _CONTROLS if steered}
    rises = sorted((get(run, "rises") or {}).items(), key=lambda item: -item[1])
    return Row(
        vector=run["vector"] if steered else "unsteered",
        site=run["site"],
        how=sweep.how(run),
        alpha=_alpha(run) if steered else "",
        pareto=bool(run.get("pareto")),
        kept=sweep.keeps(run),
        best=run is sweep.best,
        scores={key: _score(run, key, *how) for key, how in formats.items()},
        changes={key: _change(run, key, *how) for key, how in formats.items() if get(run, "changes", key)},
        controls={kind: _shares(run, runs) for kind, runs in controls.items() if runs},
        rises=", ".join(f"{answer or _NOTHING} +{fixed(rise, 0)}" for answer, rise in rises[:_RISES]),
        clear=_clear_targets(run),
    )


def _alpha(run: Json) -> str:
    return f"{run['alpha']:g}".replace("-", "−")


def _score(run: Json, key: str, factor: int, digits: int) -> Cell:
    value, bounds = (scaled(get(run, part, key), factor) for part in ("scores", "intervals"))
    return Cell(fixed(value, digits), interval(bounds, digits))


def _change(run: Json, key: str, factor: int, digits: int) -> Cell:
    change = run["changes"][key]
    value, bounds = (scaled(change[part], factor) for part in ("difference", "interval"))
    return Cell(fixed(value, digits, signed=True), interval(bounds, digits), verdict(bounds))


def _shares(run: Json, controls: Sequence[Json]) -> Cell:
    """The target share of a control with its interval, or the mean of several with the lowest and highest."""
    told = _told(max(controls, key=lambda one: one["scores"]["target"]), run, "target")
    note = "" if told == "lower" else told
    if len(controls) == 1:
        return replace(_score(controls[0], "target", 100, 1), note=note)
    shares = [100 * one["scores"]["target"] for one in controls]
    ends = f"{fixed(min(shares))}–{fixed(max(shares))}, {len(shares)} draws"
    return Cell(fixed(sum(shares) / len(shares)), ends, note=note)


# --- vectors against each other ---------------------------------------------------------------------------


def _comparison(sweep: Sweep, runs: Sequence[Json]) -> list[str]:
    """How the best of the vectors that steer at the same place in the same way differs from the others."""
    settings: dict[tuple[str, ...], list[Json]] = {}
    for run in runs:
        settings.setdefault(_setting(run), []).append(run)
    compared = [run for runs in settings.values() if len(runs) > 1 for run in runs]
    if not compared:
        return []
    best = sweep.best_of(compared)
    others: dict[tuple[str, str], list[str]] = {}
    for other in settings[_setting(best)]:
        if other is not best:
            told = (_told(best, other, "target"), _told(best, other, sweep.quality))
            others.setdefault(told, []).append(_named(other))
    place = ", ".join(filter(None, (best["site"], sweep.how(best))))
    return [
        f"At {place}, {_named(best)} against {', '.join(names)}: target share {share}, quality {quality}."
        for (share, quality), names in others.items()
    ]


def _named(run: Json) -> str:
    return f"{run['vector']} (α {_alpha(run)})"


def _told(one: Json, other: Json, measure: str) -> str:
    """By the paired intervals of their changes from the unsteered run."""
    ours, theirs = (run["changes"][measure]["interval"] for run in (one, other))
    if ours[0] <= theirs[1] and theirs[0] <= ours[1]:
        return "not told apart"
    return "higher" if ours[0] > theirs[1] else "lower"


def _clear(sweep: Sweep) -> list[tuple[str, int, str, Any]]:
    """Answer that steered runs clearly lead to, how many, and the clearest with how far that answer is ahead."""
    by_answer: dict[str, list[Json]] = {}
    for run in sweep.steered:
        if get(run, "selection", "clear"):
            by_answer.setdefault(_clear_targets(run), []).append(run)
    rows = []
    for answer, runs in by_answer.items():
        clearest = max(runs, key=lambda run: get(run, "selection", "gap") or 0)
        rows.append((answer, len(runs), clearest["name"], get(clearest, "selection", "gap")))
    return sorted(rows, key=lambda row: -row[1])


def _clear_targets(run: Json) -> str:
    """The one answer that it clearly leads to; empty where there is none."""
    if not get(run, "selection", "clear"):
        return ""
    return ", ".join(answer or _NOTHING for answer in get(run, "selection", "targets") or [])


# --- examples ---------------------------------------------------------------------------------------------


def _examples(sweep: Sweep, samples: Json, pictures: Pictures) -> Json | None:
    """Some samples of the best run: evenly from the changed ones, and from those that are not."""
    if not sweep.texts:
        return None
    before, after = (sweep.texts[run["name"]] for run in (sweep.unsteered, sweep.best))
    ids = [i for i in by_size(before) if i in after]
    changed = [i for i in ids if before[i] != after[i]]
    kept = [i for i in ids if before[i] == after[i]]
    chosen = spread(changed, _EXAMPLES - bool(kept))
    chosen += spread(kept, _EXAMPLES - len(chosen))
    items = []
    for i in chosen:
        sample = get(samples, f"{'question' if sweep.asks else 'caption'}/{i}")
        path, prompt = get(sample, "image"), asked(sample)
        picture = pictures(str(path), f"picture of sample {i}") if path else None
        items.append(Example(picture, prompt, before[i], after[i]))
    prompts = {item.prompt for item in items}
    return {
        "items": items,
        "total": len(ids),
        "changed": len(changed),
        # The same for all captions, and said once.
        "prompt": prompts.pop() if len(prompts) == 1 else "",
    }
