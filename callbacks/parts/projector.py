"""States in TensorBoard's embedding projector, coloured by concept and shown by picture."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .concept_states import ConceptStates
from .figures import thumbnail

# More or larger pictures than these, and the projector does not show the sprite.
_STATES = 1024
_THUMBNAIL = 64
_WORDS = 3


def add_states(
    writer: Any, tag: str, found: ConceptStates, assigned: Tensor, words: list[list[str]], seed: int
) -> None:
    """Add states with their concept, its first words, the sample, the token they predict, and a small picture.

    Args:
        writer: TensorBoard's writer.
        tag: Name of the embedding.
        found: The states; of many, some are drawn.
        assigned: Concept of each state [N]; −1 for none.
        words: Words of each concept.
        seed: Seed of the draw.
    """
    order = torch.randperm(len(found.ids), generator=torch.Generator().manual_seed(seed))
    rows = order[:_STATES].sort().values
    pictures = {found.ids[row]: found.samples[found.ids[row]]["image"] for row in rows.tolist()}
    thumbnails = {sample_id: np.asarray(thumbnail(path, _THUMBNAIL)) for sample_id, path in pictures.items()}
    images = np.stack([thumbnails[found.ids[row]] for row in rows.tolist()])
    metadata = []
    for row in rows.tolist():
        concept = int(assigned[row])
        named = " ".join(words[concept][:_WORDS]) if concept >= 0 else ""
        # Quoted, so that a blank can be seen and a line break breaks no line.
        metadata.append([concept, named, _cell(found.ids[row]), repr(found.tokens[row])])
    # What an earlier run left here; TensorBoard's writer would complain of it.
    shutil.rmtree(Path(writer.log_dir) / "00000" / tag, ignore_errors=True)
    writer.add_embedding(
        found.shards.take(rows.tolist()).load(),
        metadata=metadata,
        metadata_header=["concept", "words", "sample", "token"],
        label_img=torch.from_numpy(images).permute(0, 3, 1, 2) / 255,
        tag=tag,
    )


def _cell(text: str) -> str:
    return " ".join(text.split())
