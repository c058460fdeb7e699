"""Figures for TensorBoard: concepts with their words and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image

from ...datamodules.images import read_image

_THUMBNAIL = 96


def tensorboard(trainer: L.Trainer) -> Any | None:
    """The TensorBoard writer of the run, or nothing where it logs elsewhere."""
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def thumbnail(path: str | Path, size: int = _THUMBNAIL) -> Image.Image:
    """A picture as a small square, only its middle where it is oblong; gray where it is no longer there.

    Stored features may outlive their pictures, or be replayed on another machine.

    Args:
        path: The picture.
        size: Width and height in pixels.
    """
    if not Path(path).is_file():
        return Image.new("RGB", (size, size), "lightgray")
    picture = read_image(Path(path))
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size))


def picture_grid(labels: Sequence[str], paths: Sequence[Sequence[str]], size: int = 64) -> Figure:
    """Pictures in one image, a row a concept: quicker to draw than `concept_figure`.

    Args:
        labels: What is written beside each row.
        paths: Picture paths of each concept.
        size: Width and height of a picture in pixels.
    """
    columns = max(1, *(len(row) for row in paths))
    grid = Image.new("RGB", (columns * size, len(paths) * size), "white")
    for y, row in enumerate(paths):
        for x, path in enumerate(row):
            grid.paste(thumbnail(path, size), (x * size, y * size))
    figure = Figure(figsize=((grid.width + 200) / 72, (grid.height + 20) / 72), dpi=72, layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.asarray(grid))
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([(y + 0.5) * size for y in range(len(labels))], labels, fontsize=10, parse_math=False)
    axes.tick_params(length=0)
    return figure


def concept_figure(
    words: Sequence[Sequence[str]],
    images: Sequence[Sequence[str]],
    heat_maps: Sequence[Sequence[str | Path]] | None = None,
) -> Figure:
    """One row a concept: its words and the pictures that activate it most.

    Args:
        words: Words of each concept.
        images: Picture paths of each concept.
        heat_maps: Path of the heat-map of each of these pictures, to be shown beside it.
    """
    shown: list[list[str | Path]] = [list(paths) for paths in images]
    if heat_maps is not None:
        pairs = [list(zip(*both, strict=True)) for both in zip(images, heat_maps, strict=True)]
        shown = [[path for pair in row for path in pair] for row in pairs]
    columns = max((len(paths) for paths in shown), default=0)
    figure = Figure(figsize=(3.2 + 1.1 * columns, 1.15 * len(words)), layout="constrained")
    axes = figure.subplots(len(words), columns + 1, squeeze=False, width_ratios=[2.6, *[1.0] * columns])
    for concept, (row, named, paths) in enumerate(zip(axes, words, shown, strict=True)):
        row[0].text(0, 0.5, f"{concept}: {', '.join(named) or '(no word)'}", wrap=True, va="center", fontsize=8)
        for axis in row:
            axis.axis("off")
        for axis, path in zip(row[1:], paths, strict=False):
            axis.imshow(thumbnail(path))
    return figure
