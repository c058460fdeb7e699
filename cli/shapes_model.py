"""`conceptshift shapes-model`: write a small untrained model for the embedded data set."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from ..datamodules import CAPTION_PROMPT, VQA_PROMPT
from ..datamodules.shapes import random_scene
from ..datamodules.shapes.language import captions, questions
from ..lightning_modules.backbone.tiny import write_tiny_llava
from ..records.paths import user_path
from .command import run_command

_SCENES = 3000  # enough for every word of Shapes to become one token


def shapes_corpus() -> Iterator[str]:
    """Texts of Shapes as a conversation has them: prompts, captions, questions, answers."""
    yield f"USER: \n{CAPTION_PROMPT} ASSISTANT:"
    for number in range(_SCENES):
        rng = random.Random(number)
        scene = random_scene(rng)
        for caption in captions(scene):
            yield f" {caption}"
        for question in questions(scene, rng):
            yield f"{question.text}{VQA_PROMPT} ASSISTANT: {question.answer}"


def shapes_model(out: str) -> None:
    """Write config, tokenizer, processor and untrained weights of shapes-llava.

    Args:
        out: Folder to write.
    """
    print(write_tiny_llava(user_path(out), shapes_corpus()))


def run(args: Sequence[str]) -> None:
    """Run the command."""
    run_command(shapes_model, args)
