"""One sample and one batch: what every reader yields and every module takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask


@dataclass(frozen=True)
class Instance:
    """One object in a picture.

    Attributes:
        category: Name of its class.
        segmentation: Its mask: COCO's run lengths, `size` (height, width) and `counts`.
    """

    category: str
    segmentation: dict[str, Any]

    def mask(self) -> NDArray[np.bool_]:
        """Where it is [height, width]."""
        return np.asarray(coco_mask.decode(self.segmentation), dtype=bool)


@dataclass
class Sample:
    """One picture with what is asked about it and what is known of the answer.

    Attributes:
        sample_id: Names the sample in every output; unique within a split.
        image: Path of the picture.
        prompt: What the user says, without the model's chat template.
        target: What the model should answer: learned in `fit`, read from when states of a given text are wanted.
        references: Reference captions.
        answers: The ten annotators' answers to a question.
        answer_type: VQAv2's `yes/no`, `number` or `other`; empty for captions.
        question_type: VQAv2's first words of a question; empty for captions.
        label: A class that the data give the sample, e.g. safe or unsafe; empty where there is none.
        instances: The objects in the picture, where the data have their masks.
        object: The class of objects that the sample is about; empty where it is about none.
        setting: How it is asked about: `generative` (a description is to name it), `polling` (yes or no), or `vqa`.
    """

    sample_id: str
    image: Path
    prompt: str
    target: str
    references: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    answer_type: str = ""
    question_type: str = ""
    label: str = ""
    instances: tuple[Instance, ...] = ()
    object: str = ""
    setting: str = ""


@dataclass
class SkippedSample:
    """A sample whose picture could not be read, and why."""

    sample_id: str
    reason: str


@dataclass
class Batch:
    """Samples with their encoding.

    Attributes:
        samples: The B samples, in the order of the rows of `inputs`.
        inputs: What the model takes: `input_ids` and `attention_mask` [B, T], the pictures, and `labels`
            [B, T] (the target's tokens; −100 wherever nothing is to be learned).
        skipped: Samples left out because their picture is unreadable.
    """

    samples: list[Sample]
    inputs: dict[str, torch.Tensor]
    skipped: list[SkippedSample] = field(default_factory=list)

    @property
    def sample_ids(self) -> list[str]:
        """The B sample ids."""
        return [sample.sample_id for sample in self.samples]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Move the tensors; Lightning calls this."""
        inputs = {name: value.to(device, non_blocking=non_blocking) for name, value in self.inputs.items()}
        return Batch(self.samples, inputs, self.skipped)


class Encoder(Protocol):
    """Turns pictures and texts into a model's inputs; a LightningModule provides it."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
        """Encode a batch."""
