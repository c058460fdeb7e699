"""Runs a model over answers that it gave, with and without a direction in some of its states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...datamodules.images import read_image
from ...lightning_modules import VisionLanguageModel
from ...lightning_modules.backbone import Generation, Selector, Steering
from .concept_states import ConceptStates
from .word_probability import WordProbability

# A state is the same when read again up to this share of the typical distance of states from their mean.
_SAME_STATE = 0.25


@dataclass(frozen=True)
class Case:
    """One state of a concept.

    Attributes:
        concept: The concept.
        row: Which of the stored states.
        nth: Which of the states that the selector chooses in its sample.
    """

    concept: int
    row: int
    nth: int


@dataclass(frozen=True)
class Trials:
    """What removing P directions did to C cases.

    Attributes:
        before: Log-probability of the concept's words at the state [C], in nats; of a mean, averaged over its states.
        falls: How much less it is after each removal [C, P].
        same: Whether the state was read again as it is stored [C]; other answers were cut into other tokens.
    """

    before: Tensor
    falls: Tensor
    same: Tensor


@torch.inference_mode()
def removal_trials(
    backbone: VisionLanguageModel,
    states: ConceptStates,
    site: str,
    selector: Selector,
    cases: list[Case],
    directions: Tensor,
    probability: WordProbability,
    *,
    batch_size: int = 32,
    title: str | None = None,
) -> Trials:
    """Remove directions from the states of cases, each from that state alone, and measure the words of its concept.

    Args:
        backbone: The model that gave the states.
        states: The stored states.
        site: Their site.
        selector: Their selector.
        cases: What to try.
        directions: P directions for each concept [K, P, D].
        probability: Log-probability of each concept's words.
        batch_size: Cases at a time; all their concepts are removed in one pass.
        title: Of a progress bar, if there is to be one.
    """
    if not cases:
        return Trials(torch.zeros(0), torch.zeros(0, directions.shape[1]), torch.zeros(0, dtype=torch.bool))
    device = backbone.model.device
    read, norm = backbone.sites([site, "lm.norm"]), backbone.sites(["lm.norm"])
    spread = states.states.var(dim=0, correction=0).sum().sqrt()
    before, after, same = [], [], []
    starts = range(0, len(cases), batch_size)
    with tqdm(total=len(starts) * directions.shape[1], desc=title, leave=False, disable=title is None) as bar:
        for start in starts:
            batch = cases[start : start + batch_size]
            concepts = torch.tensor([case.concept for case in batch])
            inputs = {name: value.to(device) for name, value in _encode(backbone, states, batch).items()}
            plain = backbone.read(inputs, read)
            # Rows are padded on the right, so columns are positions.
            mask = _chosen(plain, selector, batch)
            stored = states.states[[case.row for case in batch]]
            same.append((_mean(plain.states[site].float(), mask).cpu() - stored).norm(dim=1) <= _SAME_STATE * spread)

            def measured(generation: Generation, mask: Tensor = mask, concepts: Tensor = concepts) -> Tensor:
                rows, columns = (index.cpu() for index in mask.nonzero(as_tuple=True))
                logits = backbone.unembed(generation.states["lm.norm"][rows, columns])
                each = mask.new_zeros(mask.shape, dtype=torch.float64, device="cpu")
                each[rows, columns] = probability(logits, concepts[rows])
                return _mean(each[:, :, None], mask.cpu())[:, 0]

            before.append(measured(plain))
            trials = []
            for direction in directions[concepts].unbind(dim=1):
                with backbone.intervene(Steering(site, direction, positions=mask, mode="project_away")):
                    trials.append(measured(backbone.read(inputs, norm)))
                bar.update()
            after.append(torch.stack(trials, dim=1))
    return Trials(torch.cat(before), torch.cat(before)[:, None] - torch.cat(after), torch.cat(same))


def _encode(backbone: VisionLanguageModel, states: ConceptStates, cases: list[Case]) -> dict[str, Tensor]:
    samples = [states.samples[states.ids[case.row]] for case in cases]
    return backbone.encode(
        [read_image(Path(sample["image"])) for sample in samples],
        [sample["prompt"] for sample in samples],
        [sample["text"] for sample in samples],
    )


def _chosen(generation: Generation, selector: Selector, cases: list[Case]) -> Tensor:
    """Positions of each case's state [B, T]; none where the sample has no such state any more."""
    mask = torch.zeros_like(generation.token_map.roles, dtype=torch.bool)
    for row, case in enumerate(cases):
        columns = selector.columns(generation.token_map, row, mask.shape[1])
        mask[row, columns if selector.is_mean else columns[case.nth : case.nth + 1]] = True
    return mask


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the chosen positions [B, D] of values [B, T, D]; 0 where there is none."""
    return (values * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1)
