"""`conceptshift shapes`: generate the embedded data set."""

from __future__ import annotations

from collections.abc import Sequence

from ..datamodules.shapes import write_shapes
from ..records.paths import user_path
from .command import run_command


def shapes(out: str, images: int = 1000, seed: int = 0, max_things: int = 3) -> None:
    """Generate Shapes: small pictures with captions, questions, instance masks and regions in the usual formats.

    Args:
        out: Folder to make.
        images: Number of pictures, at least 40.
        seed: The same seed gives the same bytes.
        max_things: Things in a picture at most, 1 to 3.
    """
    print(write_shapes(user_path(out), images, seed, max_things))


def run(args: Sequence[str]) -> None:
    """Run the command."""
    run_command(shapes, args)
