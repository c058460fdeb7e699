"""Lays out the scores of groundings: as plain text, as Markdown, and one row a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...metrics import GroundedConcepts
from ...metrics.concept_scores import CAPTIONS, Columns
from ...records.files import write_whole

HEADER = ("score", "method", "mean", "std", "95 % interval", "n", "p")


def score_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a score and method, as in `HEADER`; Overlap, which has no samples, has a value only.

    Args:
        summary: What `GroundingScorer` writes: `scores`, `overlap`, and the order of the `methods`.
    """
    rows = [
        (name, method, *_cells(found[method]))
        for name, found in summary["scores"].items()
        for method in summary["methods"]
        if method in found
    ]
    overlap = summary["overlap"]
    rows += [
        ("Overlap", method, f"{overlap[method]:.3f}", "", "", "", "")
        for method in summary["methods"]
        if method in overlap
    ]
    published = summary["published"] or {}
    rows += [
        (f"{name}, published", method, f"{value:.3f}", "", "", "", "")
        for name in ("CLIPScore", "Overlap")
        for method, value in published.get(name, {}).items()
    ]
    return rows


def notes(summary: Mapping[str, Any]) -> str:
    """What the table is of, in one line or two."""
    lines = (
        f"{summary['method']}, {summary['k']} concepts, {summary['site']}, {summary['selector']}, "
        f"{summary['variant']}; {summary['samples']} test samples; p: {summary['method']} against the baseline"
    )
    published = summary["published"]
    return lines if published is None else f"{lines}\npublished: {published['source']}"


def plain(rows: Sequence[Sequence[str]]) -> str:
    """Aligned text."""
    table = [HEADER, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    table = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def write_samples(
    path: Path, ids: Sequence[str], methods: Mapping[str, GroundedConcepts], columns: Columns, top: int
) -> None:
    """Write one row a sample and method: the sample's strongest active concepts, and its scores.

    Args:
        path: Parquet file to write.
        ids: Sample ids [N].
        methods: Method → its grounded concepts.
        columns: Score → method → values [N].
        top: How many concepts to name.
    """
    fields = [("sample_id", pa.string()), ("method", pa.string()), ("concepts", pa.list_(pa.int32()))]
    schema = pa.schema([*fields, *((score, pa.float64()) for score in columns)])
    parts = []
    for name in (*methods, CAPTIONS):
        concepts = methods[name].named(top) if name in methods else [[]] * len(ids)
        scores = {score: values.get(name, [None] * len(ids)) for score, values in columns.items()}
        known = {"sample_id": ids, "method": [name] * len(ids), "concepts": concepts}
        parts.append(pa.table({**known, **scores}, schema=schema))
    table = pa.concat_tables(parts)
    write_whole(path, lambda working: pq.write_table(table, working))


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["interval"]
    return f"{row['mean']:.3f}", f"{row['std']:.3f}", f"[{low:.3f}, {high:.3f}]", str(row["n"]), _p(row.get("p"))


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"
