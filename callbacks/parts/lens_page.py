"""The page of the logit lens: one picture, its patches, and what every layer decodes at every position."""

from __future__ import annotations

import io
import json
import zlib
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from ...lightning_modules.backbone.patch_grid import PatchGrid
from ...records.files import write_whole

_FOLDER = Path(__file__).parents[1] / "lens_page"
# One after the other they are the script of a page.
_SCRIPTS = ("data.js", "measures.js", "pictures.js", "table.js", "controls.js")
# Longest sides in pixels of what pages and the index embed.
_PICTURE, _THUMBNAIL = 1024, 160


@dataclass(frozen=True)
class LensVariant:
    """What one model makes of the picture: L layers, N positions of its sequence, k tokens each.

    Attributes:
        name: `original`, `steered`, or the name of a destination.
        answer: What it says.
        token_ids: What stands at each position [N].
        roles: `image`, `prompt`, `special` or `answer`, of each position [N].
        image_index: Number of the visual token at each position, −1 elsewhere [N].
        top_ids: Tokens of highest probability [L, N, k], the highest first.
        top_probabilities: Their probabilities [L, N, k].
    """

    name: str
    answer: str
    token_ids: NDArray[np.int64]
    roles: Sequence[str]
    image_index: NDArray[np.int64]
    top_ids: NDArray[np.int64]
    top_probabilities: NDArray[np.float32]


@dataclass(frozen=True)
class LensPage:
    """All that a page shows. The variants' prompts are the same; their answers, and so N, need not be.

    Attributes:
        title: Name of the picture.
        picture: The picture.
        prompt: What was asked.
        references: What people say of it; may be empty.
        model: What the variants are of: folder or hub id.
        layers: Names of the L layers, `lm.embed` first where it is there.
        grid: Where the visual tokens lie in the picture; none where they cannot be placed.
        no_grid: Why not; empty where they can.
        variants: One or more.
    """

    title: str
    picture: Image.Image
    prompt: str
    references: Sequence[str]
    model: str
    layers: Sequence[str]
    grid: PatchGrid | None
    no_grid: str
    variants: Sequence[LensVariant]


def write_page(path: Path, page: LensPage, decode: Callable[[int], str]) -> dict[str, Any]:
    """Write one HTML file that needs nothing else.

    Probabilities are kept as whole numbers of √p · 65,535: p is off by at most 1.6e-5 · √p.

    Args:
        path: File to write.
        page: What it shows.
        decode: Token id → text; called once for each distinct token of the page.

    Returns:
        The page's entry for `write_index`, which JSON can hold; `file` is the file's name.

    Raises:
        OSError: The file cannot be written.
    """
    sizes = {variant.top_ids.shape[::2] for variant in page.variants}
    assert len(sizes) == 1, f"variants differ in layers or tokens kept: {sizes}"
    table, number = _distinct([ids for variant in page.variants for ids in (variant.top_ids, variant.token_ids)])
    bits = 16 if len(table) <= 1 << 16 else 32
    shown = {
        "size": page.picture.size,
        "layers": page.layers,
        "grid": page.grid and {name: value.tolist() for name, value in vars(page.grid).items()},
        "bits": bits,
        "tokens": [decode(token) for token in table.tolist()],
        "variants": [
            {
                "name": variant.name,
                "tokens": number[variant.token_ids].tolist(),
                "roles": list(variant.roles),
                "visual": variant.image_index.tolist(),
            }
            for variant in page.variants
        ],
    }
    arrays = [
        {
            "ids": _packed(number[variant.top_ids].astype(f"<u{bits // 8}")),
            "roots": _packed((np.sqrt(variant.top_probabilities) * 65535).round().astype("<u2")),
        }
        for variant in page.variants
    ]
    data = {"page": _base64(zlib.compress(json.dumps(shown).encode())), "variants": arrays}
    _write(path, "page.html.jinja", _SCRIPTS, page=page, picture=_jpeg(page.picture, _PICTURE), data=data)
    return {
        "file": path.name,
        "title": page.title,
        "model": page.model,
        "size": list(page.picture.size),
        "prompt": page.prompt,
        "answers": {variant.name: variant.answer for variant in page.variants},
        "thumbnail": _jpeg(page.picture, _THUMBNAIL),
    }


def write_index(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write the page that leads to the others, as self-contained as they are.

    Args:
        path: File to write.
        entries: What `write_page` returned, in the order to show; `file` relative to the folder of `path`.

    Raises:
        OSError: The file cannot be written.
    """
    links = [entry | {"link": quote(entry["file"], errors="surrogateescape")} for entry in entries]
    _write(path, "index.html.jinja", ["index.js"], entries=links, models=sorted({entry["model"] for entry in entries}))


def _distinct(groups: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct ids in ascending order, and id → place among them."""
    used = np.zeros(1 + max(int(ids.max(initial=0)) for ids in groups), dtype=bool)
    for ids in groups:
        used[ids] = True
    return np.flatnonzero(used), used.cumsum() - 1


@cache
def _templates() -> Environment:
    """The templates, each compiled once for all pages."""
    loader = FileSystemLoader(_FOLDER)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _write(path: Path, template: str, scripts: Sequence[str], **values: Any) -> None:
    files = {"style": ["lens.css"], "script": scripts}
    own = {
        kind: "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in names) for kind, names in files.items()
    }
    # Nothing but these two runs or styles, whatever a caption or a token says.
    allowed = {name: "sha256-" + _base64(sha256(text.encode()).digest()) for name, text in own.items()}
    trusted = {name: Markup(text) for name, text in own.items()}
    text = _templates().get_template(template).render(allowed=allowed, **trusted, **values)
    # File names need not be text: what of them is none becomes a question mark.
    write_whole(path, lambda working: working.write_text(text, encoding="utf-8", errors="replace"))


def _packed(values: NDArray[Any]) -> str:
    return _base64(zlib.compress(values.tobytes()))


def _jpeg(picture: Image.Image, longest: int) -> str:
    small = picture.convert("RGB")
    small.thumbnail((longest, longest))
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{_base64(jpeg.getvalue())}"


def _base64(content: bytes) -> str:
    return b64encode(content).decode("ascii")
