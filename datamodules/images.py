"""Reads pictures from disk: upright, RGB, or with one clear error."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
"""Pictures with more pixels than this are refused before they are decoded (a decompression bomb)."""

_WAY_OUT = "mend it, or leave such pictures out with --data.init_args.skip_bad_images=true"


class BadImageError(ValueError):
    """A picture that cannot be used; the message names it."""


def image_path(root: Path, *parts: str) -> Path:
    """Join a file name from an annotation file to the data folder.

    Raises:
        BadImageError: The name leads out of `root`.
    """
    path = root.joinpath(*parts)
    if not path.resolve().is_relative_to(root.resolve()):
        raise BadImageError(f"{'/'.join(parts)}: an annotation names a file outside {root}; mend it there")
    return path


def read_image(path: Path, content: bytes | None = None) -> Image.Image:
    """Read one picture as RGB, turned upright by its EXIF orientation.

    Grayscale, palette and CMYK pictures are converted.

    Args:
        path: The file.
        content: What is in it, where that is at hand; the file need not be there then.

    Raises:
        BadImageError: The picture is missing, truncated, no picture, or larger than `MAX_PIXELS`.
    """
    if content is None and not path.is_file():
        raise BadImageError(f"{path}: no such picture; {_WAY_OUT}")
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels on; the limit that counts is ours.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path if content is None else BytesIO(content)) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise BadImageError(f"{path}: {width} x {height} pixels, more than {MAX_PIXELS:,}; {_WAY_OUT}")
                upright = ImageOps.exif_transpose(picture)
                if upright.mode.startswith("I;16"):
                    # Pillow would clip 16-bit grays at 255 instead of scaling them.
                    upright = Image.fromarray((np.asarray(upright) // 256).astype(np.uint8))
                return upright.convert("RGB")
    except Image.DecompressionBombError as error:
        raise BadImageError(f"{path}: more than {MAX_PIXELS:,} pixels; {_WAY_OUT}") from error
    except UnidentifiedImageError as error:
        raise BadImageError(f"{path}: not a picture that Pillow can read; {_WAY_OUT}") from error
    except (OSError, SyntaxError) as error:
        raise BadImageError(f"{path}: truncated or damaged picture ({error}); {_WAY_OUT}") from error
