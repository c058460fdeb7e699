"""`conceptshift export-vector`: write a steering vector as a control vector of llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..concepts import load_steering_vectors
from .command import run_command


def export_vector(vector: str, out: str, site: list[str] | None = None, model_hint: str = "llama") -> None:
    """Write steering vectors as a GGUF file, for `llama-cli --control-vector`.

    Args:
        vector: File that a SteeringVectorMaker wrote, with vectors of blocks after the first of the language model.
        out: File to write; its name ends in `.gguf`.
        site: Sites to write, where the file has several: llama.cpp adds all that it is given. By default all.
        model_hint: What llama.cpp calls the model's architecture; it does not check it.
    """
    if Path(out).suffix != ".gguf":
        raise ValueError(f"--out must be a name that ends in .gguf, got {out}")
    vectors = load_steering_vectors(vector).at(site)
    vectors.save_gguf(out, model_hint)
    print(f"{out}: {len(vectors.vectors)} vectors, for llama-cli --control-vector-scaled {out}:ALPHA")


def run(args: Sequence[str]) -> None:
    """Run the command."""
    run_command(export_vector, args)
