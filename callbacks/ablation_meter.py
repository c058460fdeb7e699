"""Measures what a model can no longer answer when some of a picture's visual tokens are replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from zlib import crc32

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from ..concepts import MeanToken
from ..datamodules.object_names import ObjectNames
from ..datamodules.sample import Sample
from ..lightning_modules import Inspection, VisionLanguageModel
from ..lightning_modules.backbone import Steering
from ..lightning_modules.backbone.attribution import integrated_gradients
from ..lightning_modules.backbone.knockout_names import TokenSet
from ..lightning_modules.backbone.prompts import append_answers
from ..lightning_modules.backbone.token_map import Word
from ..metrics import published_ablation
from .parts.ablation_scores import AWAY, NOISE, OTHER_AWAY, RANDOM_AWAY, control_of, summarize_ablation
from .parts.noise import noise_picture
from .parts.numbers import log_rows
from .parts.object_meter import ObjectMeter
from .parts.steering_checks import check_same_model
from .parts.trial_figures import ablation_figure, ablation_table, show_figures
from .parts.trials import Asked, Found, Place

_COUNTS = (5, 10, 20, 40, 60, 100, 250)
_SETS = ["object", "object+1", "object+2", "registers"]


class AblationMeter(ObjectMeter):
    """Replaces visual tokens at `projector` by a mean one, and counts the right answers that become wrong.

    Towards Interpreting Visual Information Processing in Vision-Language Models (arXiv 2410.07149), §3. A set that is
    not random has a control: as many random tokens of the same picture. Samples whose answer stays right when the
    pixels of the object's patches are noise are answered without having been seen, by habit or from what is around the
    object; main rows are without them.

    With `directions`, the direction d of the object's class is also projected away from the visual tokens that have it
    (h·d > 0), h ← h − α (h·d) d (Interpreting and Editing Vision-Language Representations to Mitigate Hallucinations,
    arXiv 2410.02762, §5; there d is the state of a word): the answer should lose the object, and keep everything else.
    What d has of the mean token is left out. Controls are the direction of a class that is not in the picture, and a
    random one.

    Writes `ablation.json`, `samples.parquet` and `figures/`. Intervals are bootstraps over pictures, at 95 %.

    Args:
        out: Folder to write to; by default `ablation` in the run's folder.
        sets: What to replace: `object` (the tokens whose patch overlaps it), `object+K` (with K rings of neighbours),
            `image-object`, `image`, `last_row`, `registers` (unusually long tokens), `random:N`, `gradients:N` (those
            of highest attribution by integrated gradients, which need a `reference`). By default all that are
            published: object with up to 2 rings, registers, and 5 to 250 at random and, with a reference, by gradients.
        reference: File of `conceptshift mean-token`, whose mean token takes their place, and is the baseline of the
            gradients; by default zero takes it.
        steps: Steps of the integrated gradients.
        noise: Whether to ask about noise at the object's place, too.
        directions: File of `conceptshift mean-token --annotations` with directions of classes, at any site.
        strength: α, how much of a direction is projected away: 1 removes it, 2 turns it round.
        overwrite: Begin anew, whatever is there.
    """

    result = "ablation.json"

    place = "ablation"

    def __init__(
        self,
        out: str | None = None,
        sets: list[str] | None = None,
        reference: str | None = None,
        steps: int = 50,
        noise: bool = True,
        directions: str | None = None,
        strength: float = 2.0,
        overwrite: bool = False,
    ) -> None:
        super().__init__(out, overwrite)
        if steps < 1:
            raise ValueError(f"AblationMeter.steps must be at least 1, got {steps}")
        if sets is None:
            kinds = ["random"] if reference is None else ["gradients", "random"]
            sets = [*_SETS, *(f"{kind}:{count}" for kind in kinds for count in _COUNTS)]
        self.sets = [TokenSet.parse(name) for name in sets]
        if reference is None and (wanting := [one.name for one in self.sets if one.kind == "gradients"]):
            # A norm makes all of zero: along the way from there the gradients say nothing.
            raise ValueError(
                f"AblationMeter.sets: {wanting[0]!r} needs a token from which the gradients begin; give `reference`, a "
                "file of `conceptshift mean-token`"
            )
        self.reference = reference
        self.steps = steps
        self.noise = noise
        self.directions = directions
        self.strength = strength
        self._token: Tensor | None = None
        self._directions: MeanToken | None = None

    def options(self) -> dict[str, Any]:
        """What its measurements depend on, besides model and data."""
        files = {"reference": self.reference, "directions": self.directions}
        return {
            "sets": [one.name for one in self.sets],
            "steps": self.steps,
            "noise": self.noise,
            "strength": self.strength,
            **{name: None if file is None else MeanToken.load(file).content_hash for name, file in files.items()},
        }

    def check(self, module: Inspection) -> None:
        """Read the files, and check that they are of this model."""
        backbone = module.backbone
        width = backbone.unembed.shape[1]
        self._token = torch.zeros(width)
        if self.reference is not None:
            found = _read(self.reference, backbone, width)
            if found.site != "projector":
                raise ValueError(
                    f"{self.reference}: a mean of states at {found.site!r}, not of visual tokens at 'projector'; make "
                    "one with `conceptshift mean-token`"
                )
            self._token = found.mean.float()
        if self.directions is not None:
            self._directions = _read(self.directions, backbone, width)
            if not self._directions.objects:
                raise ValueError(
                    f"{self.directions}: has no directions of classes; make it with `conceptshift mean-token "
                    "--annotations`"
                )

    def measure(self, asked: Asked, names: ObjectNames) -> Iterator[tuple[str, Sequence[int], Sequence[str]]]:
        """Replace every set, and its control; then the object's pixels; then project its direction away."""
        assert self._token is not None
        said: dict[bytes, list[str]] = {}
        attributions = None
        if any(one.kind == "gradients" for one in self.sets):
            attributions = self._attributions(asked, names)
        for token_set in self.sets:
            chosen = asked.choose(token_set, attributions)
            yield from self._replaced(asked, token_set.name, token_set, chosen, said)
            if token_set.kind != "random":
                control = control_of(token_set.name)
                yield from self._replaced(asked, control, token_set, asked.choose_as_many(chosen), said)
        if self.noise:
            inputs = asked.encode(
                [noised(*one) for one in zip(asked.samples, asked.places, asked.pictures, strict=True)]
            )
            texts = asked.backbone.generate(inputs, asked.module.max_new_tokens).texts
            yield NOISE, [int(place.tokens.sum()) for place in asked.places], texts
        if self._directions is not None:
            yield from self._projected_away(asked, self._directions)

    def _replaced(
        self, asked: Asked, name: str, token_set: TokenSet, chosen: list[Tensor], said: dict[bytes, list[str]]
    ) -> Iterator[tuple[str, Sequence[int], Sequence[str]]]:
        """Ask with some visual tokens replaced.

        Args:
            asked: Whom.
            name: What it is called.
            token_set: The set, for messages.
            chosen: Its tokens in each sample.
            said: What has been answered so far, by the tokens that were replaced; grows.
        """
        assert self._token is not None
        counts = [int(tokens.sum()) for tokens in chosen]
        if not any(counts):
            return
        key = torch.cat(chosen).numpy().tobytes()
        if key not in said:
            mask = asked.positions(token_set, chosen)
            steering = Steering("projector", self._token, positions=mask, mode="replace")
            said[key] = asked.answer(name, [steering], control=name != token_set.name)
        yield name, counts, said[key]

    def _attributions(self, asked: Asked, names: ObjectNames) -> list[Tensor]:
        """What each visual token contributes to the word of the answer that names the object."""
        assert self._token is not None
        backbone, token_map = asked.backbone, asked.unaltered.token_map
        inputs = append_answers(
            asked.inputs, token_map.answers, backbone.tokenizer.pad_token_id, backbone.encode.image_token_id
        )
        starts = asked.inputs["attention_mask"].sum(dim=1)
        words = [telling(*one, names) for one in zip(asked.samples, token_map.words, strict=True)]
        targets = starts + torch.tensor(words, device=starts.device)
        return integrated_gradients(backbone, inputs, self._token, self.steps, targets)

    def _projected_away(
        self, asked: Asked, directions: MeanToken
    ) -> Iterator[tuple[str, Sequence[int], Sequence[str]]]:
        """Ask with the direction of each sample's class projected away where tokens have it, and with others."""
        own, other, chance = [], [], []
        for sample in asked.samples:
            direction, classes = directions.objects.get(sample.object), _absent(sample, directions)
            nothing = torch.zeros_like(directions.mean)
            seed = crc32(sample.sample_id.encode())
            drawn = torch.randn(len(nothing), generator=torch.Generator().manual_seed(seed))
            own.append(nothing if direction is None else direction)
            other.append(
                directions.objects[classes[seed % len(classes)]] if direction is not None and classes else nothing
            )
            chance.append(nothing if direction is None else drawn)
        states = [tokens.cpu() for tokens in asked.visual_states(directions.site)]
        for name, found in ((AWAY, own), (OTHER_AWAY, other), (RANDOM_AWAY, chance)):
            vectors = [_without(vector, directions.mean) for vector in found]
            having = [tokens @ vector > 0 for tokens, vector in zip(states, vectors, strict=True)]
            if any(tokens.any() for tokens in having):
                mask = asked.positions(TokenSet.parse("image"), having)
                steering = Steering(directions.site, torch.stack(vectors), self.strength, mask, mode="project_away")
                yield name, [int(tokens.sum()) for tokens in having], asked.answer(name, [steering], name != AWAY)

    def summarize(self, module: Inspection, found: Found, names: ObjectNames) -> dict[str, Any]:
        """Shares of answers that become wrong, with intervals, controls, and what is published."""
        sets = [one.name for one in self.sets]
        variants = {name: summarize_ablation(found, name, sets, names) for name in module.variants}
        return {
            "reference": self.reference,
            "directions": self.directions,
            "variants": variants,
            "nowhere": found.nowhere(sets),
            "published": published_ablation(),
        }

    def show(self, trainer: L.Trainer, summary: dict[str, Any]) -> None:
        """Draw bars, and print the table."""
        show_figures({"ablation": ablation_figure(summary)}, self.out, trainer)
        log_rows(trainer, "ablation", summary, "set", "became_wrong")
        rank_zero_info(f"{self.out / self.result}\n{ablation_table(summary)}")


def _read(file: str, backbone: VisionLanguageModel, width: int) -> MeanToken:
    """Read a mean token of this model.

    Raises:
        ValueError: It does not fit.
    """
    found = MeanToken.load(file)
    if len(found.mean) != width:
        raise ValueError(
            f"{file}: states of width {len(found.mean)}, but those of {backbone.source} have {width}; it was made for "
            "another model"
        )
    check_same_model(file, found.metadata, backbone)
    return found


def telling(sample: Sample, words: list[Word], names: ObjectNames) -> int:
    """Which token of an answer tells the object.

    Of a description it is the one that begins the word that completes the object's name; of an answer to a question,
    the one that begins the first word, whatever stands before it.

    Args:
        sample: What was asked.
        words: Words of the answer, with their tokens.
        names: How texts name objects.
    """
    if sample.setting == "generative":
        text = " ".join(word.text for word in words)
        ends = np.cumsum([len(word.text) + 1 for word in words])
        for category, last in names.mentions(text):
            if category == sample.object:
                return words[int(np.searchsorted(ends, last, side="right"))].first
    return words[0].first if words else 0


def noised(sample: Sample, place: Place, picture: Image.Image) -> Image.Image:
    """A picture with noise in the patches of its object.

    Args:
        sample: Its id seeds the noise.
        place: Where the object is.
        picture: The picture.
    """
    pixels = np.array(picture)
    inside = np.zeros(place.mask.shape, dtype=bool)
    for left, top, right, bottom in place.grid.boxes[place.tokens].round().long().tolist():
        inside[max(top, 0) : max(bottom, top + 1, 0), max(left, 0) : max(right, left + 1, 0)] = True
    pixels[inside] = np.asarray(noise_picture(picture.size, sample.sample_id, seed=0))[inside]
    return Image.fromarray(pixels)


def _without(vector: Tensor, mean: Tensor) -> Tensor:
    """A direction without what all tokens have of it; tokens then have it that are more so than the mean one."""
    return vector - (vector @ mean) / mean.square().sum().clamp_min(torch.finfo(mean.dtype).tiny) * mean


def _absent(sample: Sample, directions: MeanToken) -> list[str]:
    """Classes with a direction that are not in a picture."""
    there = {sample.object, *(instance.category for instance in sample.instances)}
    return sorted(directions.objects.keys() - there)
