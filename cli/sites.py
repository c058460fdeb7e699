"""`conceptshift sites`: list the sites of a model."""

from __future__ import annotations

from collections.abc import Sequence

from ..lightning_modules import VisionLanguageModel
from .command import run_command


def sites(model: str, revision: str | None = None) -> None:
    """List where the hidden states of a model can be read or steered.

    Args:
        model: Folder in the Hugging Face layout, or hub id.
        revision: Commit or tag on the hub.
    """
    backbone = VisionLanguageModel.load(model, revision=revision)
    for site in backbone.sites(["*"]):
        print(f"{site.name:<18}{site.at} of {type(site.module).__name__}, one state per {_ROWS[site.positions]}")


_ROWS = {
    "sequence": "position of the sequence",
    "image": "visual token",
    "patches": "patch of the picture",
}


def run(args: Sequence[str]) -> None:
    """Run the command."""
    run_command(sites, args)
