"""Asks a model about objects again, with something done to it: what ablation and knockout share.

Notation: B samples of a batch, P visual tokens of one picture in the order of a `PatchGrid`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from ...datamodules.images import read_image
from ...datamodules.object_names import ObjectNames
from ...datamodules.objects import SETTINGS
from ...datamodules.sample import Sample
from ...lightning_modules import Inspection, VisionLanguageModel
from ...lightning_modules.backbone import Generation, Steering
from ...lightning_modules.backbone.knockout import AttentionKnockout, changed
from ...lightning_modules.backbone.knockout_names import TokenSet, positions, resolve
from ...lightning_modules.backbone.patch_grid import PatchGrid
from ...lightning_modules.backbone.visual_sets import object_tokens
from ...metrics import normalize_answer, vqa_accuracy

UNALTERED = "unaltered"
_PROJECTOR = "projector"
# An answer to a question is right where at least half of it is.
_RIGHT = 0.5


@dataclass(frozen=True)
class Trial:
    """What one variant answers when something is done to it.

    Attributes:
        variant: `original`, `steered`, or the name of a destination.
        name: What is done.
        tokens: To how many visual tokens; of the unaltered answer, how many the picture has.
        text: The answer.
        right: Whether it is right.
    """

    variant: str
    name: str
    tokens: int
    text: str
    right: bool


@dataclass(frozen=True)
class Place:
    """Where the object of a sample lies.

    Attributes:
        grid: The picture's visual tokens.
        mask: The object, in pixels of the picture [height, width].
        tokens: Those of the visual tokens whose patch it overlaps [P].
    """

    grid: PatchGrid
    mask: NDArray[np.bool_]
    tokens: Tensor


def is_right(sample: Sample, text: str, names: ObjectNames) -> bool:
    """Whether an answer names the object, says yes first, or is VQAv2's by half; one of no words never is.

    Args:
        sample: What was asked: its `setting` decides.
        text: The answer.
        names: How texts name objects.
    """
    words = normalize_answer(text).split()
    if sample.setting == "generative":
        return sample.object in names.named(text)
    if sample.setting == "polling":
        return words[:1] == ["yes"]
    return bool(words) and vqa_accuracy(text, sample.answers) >= _RIGHT


def locate(sample: Sample, backbone: VisionLanguageModel) -> Place:
    """Find the object of a sample among the visual tokens of its picture.

    Args:
        sample: The sample, whose object `check_objects` has found large enough.
        backbone: The model.
    """
    masks = [instance.mask() for instance in sample.instances if instance.category == sample.object]
    mask = np.logical_or.reduce(masks)
    height, width = mask.shape
    grid = backbone.patch_grid(width, height)
    return Place(grid, mask, object_tokens(grid, mask))


def check_objects(samples: Iterable[Sample], backbone: VisionLanguageModel) -> None:
    """Refuse objects that are smaller than a patch, all at once and without looking at their masks.

    Raises:
        ValueError: A picture has no instance of its sample's object, or an object is smaller than a patch.
    """
    small: list[tuple[float, Sample, int, float]] = []
    for sample in samples:
        masks = [instance.segmentation for instance in sample.instances if instance.category == sample.object]
        if not masks:
            raise ValueError(
                f"sample {sample.sample_id!r}: the mask of no {sample.object or 'object'!r} is known in its picture; "
                "take samples from --data ObjectDataModule"
            )
        height, width = masks[0]["size"]
        grid = backbone.patch_grid(width, height)
        left, top, right, bottom = grid.boxes[grid.tile >= 0].T
        patch = float(((right - left) * (bottom - top)).min())
        pixels = int(coco_mask.area(coco_mask.merge(masks)))
        # Edges of patches are measured, to about a pixel in a hundred.
        if pixels < 0.99 * patch:
            small.append((patch / (height * width), sample, pixels, patch))
    if small:
        share, sample, pixels, patch = max(small, key=lambda one: one[0])
        others = f", and so have {len(small) - 1} others" if len(small) > 1 else ""
        raise ValueError(
            f"sample {sample.sample_id!r}: its {sample.object!r} has {pixels} pixels, less than a patch of "
            f"{patch:.0f}{others}; leave such objects out with --data.init_args.least_area "
            f"{math.ceil(1000 * share) / 1000:.3f}"
        )


class Asked:
    """Samples that a variant answers rightly, ready to be asked again. To be used while the model runs as the variant.

    Args:
        module: Runs the model.
        samples: B samples.
        places: Where their objects are.
        acting: Names of what is known to change something; grows.

    Attributes:
        pictures: The B pictures.
        inputs: The encoded batch, without answers.
        unaltered: The answers when nothing is done, with states at `projector` and of the last block.

    Raises:
        ValueError: A picture has another size than the mask of its object.
    """

    def __init__(
        self, module: Inspection, samples: Sequence[Sample], places: Sequence[Place], acting: set[str]
    ) -> None:
        self.module, self.backbone = module, module.backbone
        self.samples, self.places, self.acting = samples, places, acting
        self.pictures = [read_image(sample.image) for sample in samples]
        for sample, place, picture in zip(samples, places, self.pictures, strict=True):
            if place.mask.shape != (picture.height, picture.width):
                raise ValueError(
                    f"{sample.image}: {picture.width} x {picture.height} pixels, but the masks of its objects have "
                    f"{place.mask.shape[1]} x {place.mask.shape[0]}; are they of this picture?"
                )
        self.inputs = self.encode(self.pictures)
        projector, self._last = self.backbone.sites([_PROJECTOR, f"lm.block.{len(self.backbone.structure.blocks) - 1}"])
        self.unaltered = self.backbone.generate(self.inputs, module.max_new_tokens, [projector, self._last])
        self.states = _visual(self.unaltered, _PROJECTOR)
        """States of the visual tokens at `projector`: B of [P, D]."""

    def visual_states(self, site: str) -> list[Tensor]:
        """States of the visual tokens at a site: B of [P, D]."""
        if site == _PROJECTOR:
            return self.states
        return _visual(self.backbone.generate(self.inputs, 1, self.backbone.sites([site])), site)

    def encode(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Encode the samples' prompts with pictures of theirs."""
        return self.module.encode(pictures, [sample.prompt for sample in self.samples])

    def choose(self, token_set: TokenSet, attributions: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The tokens of a set in each sample: B boolean [P]; none where the picture has fewer than it wants.

        Args:
            token_set: Which set.
            attributions: A value of each token: B of [P]; for `gradients`.
        """
        given = [None] * len(self.samples) if attributions is None else attributions
        return [self._choose(token_set, row, values) for row, values in enumerate(given)]

    def choose_as_many(self, chosen: Sequence[Tensor]) -> list[Tensor]:
        """As many random tokens of each sample as there are in a set: B boolean [P].

        Args:
            chosen: The set in each sample: B boolean [P].
        """
        counts = [int(tokens.sum()) for tokens in chosen]
        return [self._choose(TokenSet(f"random:{n}", "random", n), row) for row, n in enumerate(counts)]

    def _choose(self, token_set: TokenSet, row: int, attributions: Tensor | None = None) -> Tensor:
        place, states, seed = self.places[row], self.states[row], self.samples[row].sample_id
        try:
            return resolve(token_set, place.grid, place.mask, states=states, attributions=attributions, seed=seed)
        except ValueError:  # it is larger than the picture
            return torch.zeros(len(place.grid.tile), dtype=torch.bool)

    def positions(self, token_set: TokenSet | str, chosen: Sequence[Tensor] = ()) -> str | Tensor:
        """Where one side of a knockout, or a set of visual tokens, stands in the samples' sequences.

        Args:
            token_set: The name.
            chosen: Of a set of visual tokens, those of each sample: B boolean [P].
        """
        image_token_id = self.backbone.encode.image_token_id
        assert image_token_id is not None, "models without visual tokens have been refused"
        return positions(token_set, self.inputs, image_token_id, chosen)

    def answer(
        self, name: str, interventions: Sequence[Steering | AttentionKnockout], control: bool = False
    ) -> list[str]:
        """Answer with something done to the model.

        Args:
            name: What it is called.
            interventions: What it is.
            control: Whether it may do nothing.

        Returns:
            B answers.

        Raises:
            ValueError: It does nothing at all, in the first batch that it is tried on.
        """
        sites = [] if control or name in self.acting else [self._last]
        with self.backbone.intervene(*interventions):
            altered = self.backbone.generate(self.inputs, self.module.max_new_tokens, sites)
        if sites and not changed(self.unaltered, altered, self._last.name).any():
            raise ValueError(
                f"{name!r} changes nothing in what the model computes before it answers, as tried on sample "
                f"{self.samples[0].sample_id!r} and {len(self.samples) - 1} others: leave it out; or, where that are "
                "few, raise --data.init_args.batch_size"
            )
        self.acting.add(name)
        return altered.texts


def _visual(generation: Generation, site: str) -> list[Tensor]:
    states = generation.states[site]
    image = generation.token_map.image_index[:, : states.shape[1]] >= 0
    return [row[here].float() for row, here in zip(states, image, strict=True)]


@dataclass(frozen=True)
class Found:
    """What all samples of a run have given.

    Attributes:
        samples: Id → sample, of those that were answered and whose object the model sees.
        trials: Variant → name → id → trial.
        left_out: Id → why the sample does not count.
        skipped: Id → why its picture could not be read.
    """

    samples: Mapping[str, Sample]
    trials: Mapping[str, Mapping[str, Mapping[str, Trial]]]
    left_out: Mapping[str, str]
    skipped: Mapping[str, str]

    @property
    def settings(self) -> list[str]:
        """The settings that there are samples of."""
        found = {sample.setting for sample in self.samples.values()}
        return [setting for setting in SETTINGS if setting in found]

    def of(self, variant: str, name: str, setting: str) -> dict[str, Trial]:
        """Id → trial, of the samples of one setting."""
        trials = self.trials.get(variant, {}).get(name, {})
        return {i: trial for i, trial in trials.items() if self.samples[i].setting == setting}

    def right(self, variant: str, setting: str) -> dict[str, Trial]:
        """Id → unaltered answer, of the samples that a variant gets right."""
        return {i: trial for i, trial in self.of(variant, UNALTERED, setting).items() if trial.right}

    def nowhere(self, names: Iterable[str]) -> list[str]:
        """Those of some names that no sample has a trial of, such as sets larger than any picture."""
        return [name for name in names if not any(name in trials for trials in self.trials.values())]

    def table(self) -> list[dict[str, Any]]:
        """One row for each trial."""
        return [
            {"sample_id": i, "setting": self.samples[i].setting, "object": self.samples[i].object, **vars(trial)}
            for by_name in self.trials.values()
            for by_id in by_name.values()
            for i, trial in by_id.items()
        ]
