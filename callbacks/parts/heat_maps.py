"""Where in a picture a concept is: heat-maps of u_k · (state of each visual token), drawn over the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...datamodules.images import read_image
from ...lightning_modules import VisionLanguageModel
from ...lightning_modules.backbone.heat_map import heat_map, visual_states
from ...records.files import write_whole

_OPACITY = 0.6
_FOLDER = "heat_maps"


def heat_maps(
    backbone: VisionLanguageModel,
    U: Tensor,
    site: str,
    pictures: list[list[dict[str, Any]]],
    samples: dict[str, dict[str, Any]],
    out: Path,
    *,
    variant: str = "original",
    signed: bool = False,
    batch_size: int = 16,
) -> list[list[dict[str, Any]]]:
    """Draw each concept over the pictures that activate it most; every picture runs through the model once.

    Args:
        backbone: The model.
        U: Concepts [K, D].
        site: Site of the concepts.
        pictures: What `pictures_of` found for each concept.
        samples: Sample id → row of the feature store.
        out: Folder of the dictionary; writes `heat_maps/<concept>-<rank>.jpg` to it, the strongest picture as rank 1.
        variant: `original`, or the name of a destination.
        signed: Whether activations are; see `overlay`.
        batch_size: Pictures at a time.

    Returns:
        `pictures` with the path of each heat-map, relative to `out`, as `heat_map`.

    Raises:
        ValueError: Visual tokens have no states at the site, or of another width, or cannot be placed in the picture.
    """
    places: dict[str, list[tuple[int, int]]] = {}
    for concept, found in enumerate(pictures):
        for rank, picture in enumerate(found, start=1):
            places.setdefault(picture["sample_id"], []).append((concept, rank))
    U = U.float().cpu()
    ids = list(places)
    starts = range(0, len(ids), batch_size)
    with backbone.running_as(variant):
        for start in tqdm(starts, f"{out}: heat-maps", leave=False, disable=len(starts) < 2):
            batch = ids[start : start + batch_size]
            images = [read_image(Path(samples[sample_id]["image"])) for sample_id in batch]
            states = visual_states(backbone, images, [samples[sample_id]["prompt"] for sample_id in batch], site)
            for sample_id, image, tokens in zip(batch, images, states, strict=True):
                if tokens.shape[1] != U.shape[1]:
                    raise ValueError(
                        f"{out}: concepts of width {U.shape[1]} at site {site!r}, where visual tokens have width "
                        f"{tokens.shape[1]}; draw them for the site that the dictionary was fitted at"
                    )
                values = U[[concept for concept, _ in places[sample_id]]] @ tokens.T
                drawn = concept_overlays(backbone, image, values, signed)
                for (concept, rank), overlaid in zip(places[sample_id], drawn, strict=True):
                    _write_jpeg(out / _name(concept, rank), overlaid)
    return [
        [{**picture, "heat_map": _name(concept, rank)} for rank, picture in enumerate(found, start=1)]
        for concept, found in enumerate(pictures)
    ]


def _name(concept: int, rank: int) -> str:
    return f"{_FOLDER}/{concept}-{rank}.jpg"


def _write_jpeg(path: Path, picture: Image.Image) -> None:
    write_whole(path, lambda working: picture.save(working, format="JPEG", quality=90))


def concept_overlays(
    backbone: VisionLanguageModel, picture: Image.Image, values: Tensor, signed: bool = False, longest: int = 336
) -> list[Image.Image]:
    """Draw values of visual tokens over their picture.

    Args:
        backbone: The model, which knows where its visual tokens lie.
        picture: The picture.
        values: Value of each visual token for each concept [K, P].
        signed: See `overlay`.
        longest: Longest side of what is drawn, in pixels; smaller pictures keep their size.

    Returns:
        K pictures.
    """
    grid = backbone.patch_grid(*picture.size)
    scale = min(1.0, longest / max(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    maps = heat_map(values, grid, picture.size, (width, height))
    return [overlay(picture, one, signed) for one in maps]


def overlay(picture: Image.Image, heat: Tensor, signed: bool = False) -> Image.Image:
    """Blend a picture, in gray, with a heat-map.

    Colors are relative to the one map: from its lowest value (dark) to its highest (bright); signed, the mean is white,
    what lies below it blue and what lies above it red, on equal scales. So they tell where in the picture a concept is,
    not how much of it. What the model does not see stays gray.

    Args:
        picture: The picture; it is brought to the size of the map.
        heat: Map [height, width]; not a number where nothing is seen.
        signed: Whether what lies below the mean is as telling as what lies above it.
    """
    seen = heat.isfinite()
    known = (heat[seen] if seen.any() else heat.new_zeros(1)).double()
    low, high = known.min(), known.max()
    if signed:
        reach = (known - known.mean()).abs().max()
        low, high = known.mean() - reach, known.mean() + reach
    # A level map has neither: it is drawn in the color of its lowest value, or of its mean.
    scaled = (heat - low) / (high - low) if high > low else torch.full_like(heat, 0.5 * signed)
    colors = matplotlib.colormaps["RdBu_r" if signed else "inferno"](scaled.nan_to_num().numpy())[..., :3]
    gray = picture.convert("L").resize((heat.shape[1], heat.shape[0]), Image.Resampling.BILINEAR)
    # Black and white would outshine the colors.
    base = (70 + 0.6 * np.asarray(gray, dtype=float))[..., None]
    opacity = _OPACITY * seen.numpy()[..., None]
    return Image.fromarray(((1 - opacity) * base + opacity * 255 * colors).round().astype(np.uint8))
