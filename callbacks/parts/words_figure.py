"""Figure of the words of concepts, before and after their shift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from .figure_style import BLUE, GRAY, INK, PALE, SIGNIFICANT, SOFT

Json = dict[str, Any]

_ROWS = 30  # concepts; more would be taller than any screen
# Left edge and width of each column, points.
_COLUMNS = {"original": (62, 206), "shifted": (282, 206), "destination": (502, 206), "recovery": (728, 132)}
_WIDTH, _LINE, _GAP, _TOP = 864, 14.5, 10.0, 58.0
_LOOKS: dict[str, Json] = {
    "": {"color": SOFT},
    "shared": {"color": BLUE, "weight": "bold"},
    "new": {
        "color": "#9c3d00",
        "weight": "bold",
        "bbox": {"facecolor": "#ffe3b8", "edgecolor": "none", "boxstyle": "round,pad=0.12"},
    },
}


def word_marks(words: Sequence[str], original: Sequence[str], counterpart: Sequence[str]) -> list[str]:
    """How each word is marked: `shared` if the counterpart has it, `new` if the original concept lacks it besides.

    Args:
        words: The words to mark.
        original: Those of the original concept.
        counterpart: Those of the concept that it should agree with.
    """
    return ["" if word not in counterpart else "shared" if word in original else "new" for word in words]


def words_figure(summary: Json) -> Figure:
    """A row a concept: its words, as they were, shifted and fine-tuned, and its recovery before and after.

    Args:
        summary: What `shift.json` holds. The largest gain of recovery comes first, empty concepts last; of more than
            30, the rest is left out.
    """
    rows = sorted(summary["concepts"], key=lambda row: (not row["samples"], -(row["recovery_gain"] or 0)))
    drawn = rows[:_ROWS]
    cells = [{name: _flow(*_marked(row, name)) for name in ("original", "shifted", "destination")} for row in drawn]
    heights = [max(2, *(flow[-1][1] + 1 for flow in cell.values() if flow)) * _LINE + _GAP for cell in cells]
    height = _TOP + sum(heights) + (_LINE if len(rows) > len(drawn) else 0)
    figure = Figure(figsize=(_WIDTH / 72, height / 72))
    # In points from the top left, so that text and lines have one measure.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(height, 0))
    axes.axis("off")
    _words_head(axes, summary)
    y = _TOP
    for row, cell, tall in zip(drawn, cells, heights, strict=True):
        axes.axhline(y, color=PALE, linewidth=0.6)
        _words_row(axes, row, cell, y + 4)
        y += tall
    if len(rows) > len(drawn):
        _write(axes, 8, y + 2, f"{len(rows) - len(drawn)} more concepts are left out", color=SOFT)
    return figure


def _marked(row: Json, name: str) -> tuple[list[str], list[str]]:
    words, original, destination = row[f"words_{name}"], row["words_original"], row["words_destination"]
    if not row["samples"]:
        return words, [""] * len(words)
    return words, word_marks(words, original, row["words_shifted"] if name == "destination" else destination)


def _flow(words: Sequence[str], marks: Sequence[str]) -> list[tuple[float, int, str, str]]:
    """Words one after the other, broken into lines: left edge in points, line, word, mark."""
    x, line, placed = 0.0, 0, []
    limit = _COLUMNS["original"][1]
    for word, mark in zip(words, marks, strict=True):
        while _wide(word, mark) > limit:
            word = word[: len(word) * 3 // 4] + "…"
        if x and x + _wide(word, mark) > limit:
            x, line = 0.0, line + 1
        placed.append((x, line, word, mark))
        x += _wide(word, mark) + 7
    return placed


def _wide(word: str, mark: str) -> float:
    font = FontProperties(weight=_LOOKS[mark].get("weight", "normal"), size=9)
    return float(text_to_path.get_text_width_height_descent(word, font, ismath=False)[0])


def _write(axes: Axes, x: float, y: float, text: str, **look: Any) -> None:
    """Text from its top left; a dollar is a dollar."""
    axes.text(x, y, text, va="top", parse_math=False, **{"fontsize": 9, **look})


def _words_head(axes: Axes, summary: Json) -> None:
    _write(axes, 8, 8, "Words of each concept", fontsize=11, weight="bold", color=INK)
    _write(axes, 282, 10, "bold: shared with the matched concept", **_LOOKS["shared"])
    _write(axes, 502, 10, "boxed: recovered by the shift", **_LOOKS["new"])
    _write(axes, 728, 6, "★ significant shift (p ≤ 0.05)", fontsize=8, color=INK)
    if any(row["samples"] and row.get("too_few_samples") for row in summary["concepts"]):
        _write(axes, 728, 18, "† too few samples to test", fontsize=8, color=INK)
    names = {"original": summary["original"], "shifted": "shifted", "destination": summary["destination"]}
    for name, text in {**names, "recovery": f"recovery, % [{100 * summary['level']:.0f} %]"}.items():
        _write(axes, _COLUMNS[name][0], 36, text, color=INK, weight="bold")


def _words_row(axes: Axes, row: Json, cell: dict[str, list[tuple[float, int, str, str]]], y: float) -> None:
    empty = not row["samples"]
    significant = row["p_adjusted"].get("magnitude", 1) <= SIGNIFICANT
    mark = " ★" if significant else " †" if row.get("too_few_samples") and not empty else ""
    _write(axes, 8, y, f"{row['concept']}{mark}", weight="bold", color=GRAY if empty else INK, fontsize=10)
    _write(axes, 8, y + _LINE, "no sample" if empty else f"n = {row['samples']}", fontsize=7.5, color=SOFT)
    for name, flow in cell.items():
        if empty and name == "shifted":
            continue
        for x, line, word, mark in flow:
            look = {"color": GRAY} if empty else _LOOKS[mark]
            _write(axes, _COLUMNS[name][0] + x, y + line * _LINE, word, **look)
    if not empty:
        _recovery_bar(axes, row, y)


def _recovery_bar(axes: Axes, row: Json, y: float) -> None:
    """Hollow where it was, filled where it is, with the interval of that."""
    left, width = _COLUMNS["recovery"]
    before, after = row["recovery_original"], row["recovery_shifted"]
    interval = row["intervals"].get("recovery_shifted")
    low, high = interval or (after, after)
    text = f"{before:.0f} → {after:.0f}" + (f"  [{low:.0f}, {high:.0f}]" if interval else "")
    _write(axes, left, y, text, color=INK)
    at, height = [left + width * value / 100 for value in (0, 100, low, high, before, after)], y + _LINE + 6
    axes.plot(at[:2], [height] * 2, color=PALE, linewidth=0.8)
    axes.plot(at[2:4], [height] * 2, color=BLUE, linewidth=3, alpha=0.35, solid_capstyle="butt")
    axes.plot(at[4], height, "o", markersize=5, markerfacecolor="white", markeredgecolor=BLUE)
    axes.plot(at[5], height, "o", markersize=5, color=BLUE)
