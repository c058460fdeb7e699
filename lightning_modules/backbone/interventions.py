"""Changes hidden states while the model runs, by hooks that never outlive their context."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...concepts import ConceptDictionary
from .hooks import attach
from .selectors import Selector
from .sites import Site
from .token_map import Role, TokenMap

Mode = Literal["add", "project_away", "replace", "clamp"]


@dataclass(frozen=True)
class Condition:
    """Steers only samples that activate a concept in the state of their last prompt position at the steered site.

    Attributes:
        dictionary: Concepts of that site.
        concept: Which one; without it every sample passes, and takes its own concept's vector.
        threshold: The activation that a sample must exceed in absolute value; without it the concept must be the
            strongest one of the sample.
    """

    dictionary: ConceptDictionary
    concept: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no condition."""
        concepts = len(self.dictionary.dictionary)
        if self.concept is not None and not 0 <= self.concept < concepts:
            raise ValueError(f"`concept` must be one of 0 … {concepts - 1} of the dictionary, got {self.concept}")
        if self.threshold is not None and (self.concept is None or not math.isfinite(self.threshold)):
            raise ValueError("`threshold` needs the `concept` whose activation is to exceed it, and must be finite")


@dataclass(frozen=True)
class Steering:
    """Changes hidden states f along a vector s: f ← f + α (f′ − f) (Representation Shift, arXiv 2501.03012, §4).

    α = 0 leaves the model exactly as it is. f′ is, with d̂ = s / ‖s‖,

    - `add`: f + s, so that f ← f + α s;
    - `project_away`: f − (f·d̂) d̂: directional ablation (arXiv 2406.11717, §2.4); the length of s does not matter, and
      a zero vector removes nothing;
    - `replace`: s itself;
    - `clamp`: f + (‖s‖ − f·d̂) d̂: the component along d̂ becomes the length of s.

    Attributes:
        site: Name of a site of the language model.
        vector: One vector for all samples [D], or one for each sample of the batch [B, D]; with a condition also one
            for each of its concepts [K, D], of which a sample takes that of its strongest.
        alpha: Strength α. A list is a schedule over the answer: its first value holds for the prompt and the state
            that predicts the first token, the second for the next state, and the last one from there on.
        positions: The positions to change: a selector, or a boolean mask over each sample's sequence without padding
            [B, L]. Padding is never changed, and at `projector` only visual tokens are.
        mode: What f′ is.
        condition: Which samples to steer; all of them by default.
    """

    site: str
    vector: Tensor
    alpha: float | Sequence[float] = 1.0
    positions: str | Tensor = "all"
    mode: Mode = "add"
    condition: Condition | None = None

    def __post_init__(self) -> None:
        """Refuse what could not be applied to any model."""
        if not self.strengths or not all(map(math.isfinite, self.strengths)):
            raise ValueError(f"`alpha` must be a finite number, or a list of at least one, got {self.alpha}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"`mode` must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        if self.vector.ndim not in (1, 2):
            raise ValueError(f"a steering vector must be [D], or [B, D] or [K, D], got {list(self.vector.shape)}")
        if self.condition is not None and self.by_concept:
            concepts = len(self.condition.dictionary.dictionary)
            if len(self.vector) != concepts:
                raise ValueError(f"{len(self.vector)} vectors for the {concepts} concepts of a dictionary")
        if isinstance(self.positions, Tensor) and self.positions.dtype != torch.bool:
            raise ValueError(f"a mask of positions must be boolean, got {self.positions.dtype}")
        if not self.vector.isfinite().all():
            raise ValueError(f"the steering vector for {self.site!r} is not finite; make it anew")
        if isinstance(self.positions, str) and Selector.parse(self.positions).needs_answer:
            raise ValueError(
                f"positions {self.positions!r} are known only after generation; give a role, a range, or a mask of "
                "positions"
            )

    @property
    def strengths(self) -> list[float]:
        """The schedule of α; a single value for a constant one."""
        return [float(self.alpha)] if isinstance(self.alpha, int | float) else [float(value) for value in self.alpha]

    @property
    def by_concept(self) -> bool:
        """Whether each sample takes the vector of its own concept."""
        return self.condition is not None and self.vector.ndim == 2


class RunningPass:
    """One pass through the model: its token map, and how far each hook has come.

    With a cache a generation calls every module first with the whole prompt and then with one column at a time; each
    hook counts the columns it has seen and so knows which ones it is shown.

    Args:
        token_map: What stands where.
        first: Column that comes first; those before it are in the cache.
    """

    def __init__(self, token_map: TokenMap, first: int = 0) -> None:
        self.token_map = token_map
        self.first = first
        self._seen: Counter[int] = Counter()

    def advance(self, hook: object, columns: int) -> int:
        """First column of those that `hook` is shown now."""
        start = self.first + self._seen[id(hook)]
        self._seen[id(hook)] += columns
        return start


class Applied:
    """One intervention at work on a model.

    What does not change from one generated token to the next is computed once a pass: steering must not be felt in the
    time that a token takes.

    Attributes:
        samples: How many samples have come by.
        passed: How many of them its condition let pass, where it has one.
    """

    def __init__(self, site: Site, steering: Steering, current: Callable[[], RunningPass | None]) -> None:
        self.site = site
        self.steering = steering
        self.current = current
        self.selector = None if isinstance(steering.positions, Tensor) else Selector.parse(steering.positions)
        self.samples = 0
        self.passed = 0
        self._pass: RunningPass | None = None
        self._vector = steering.vector
        self._passing: Tensor | None = None

    def __call__(self, state: Tensor) -> Tensor | None:
        """The state [B, T, D] as it becomes; nothing where it stays."""
        running = self.current()
        if running is None:
            raise RuntimeError("a model with interventions must be run through VisionLanguageModel.generate or .read")
        if not any(self.steering.strengths):
            return None
        start, length = running.advance(self, state.shape[1]), state.shape[1]
        if running is not self._pass:
            self._begin(running, state, start)
        mask = self._mask(running.token_map, start, length)
        if mask is False:
            return None
        if isinstance(mask, Tensor):
            mask = mask.to(state.device)
        changed = self._changed(state, self._alpha(running.token_map, start, length, state.device))
        if self._passing is not None:
            mask = self._passing[:, None] if mask is True else mask & self._passing[:, None]
        return changed if mask is True else torch.where(mask[:, :, None], changed, state)

    def _begin(self, running: RunningPass, state: Tensor, start: int) -> None:
        """Choose each sample's vector, and the samples that the condition lets pass."""
        vector, condition = self.steering.vector.to(state.device, torch.float32), self.steering.condition
        self._check_shapes(state, running.token_map.roles.shape[1] - start)
        self._passing = None
        if condition is not None:
            rows = torch.arange(len(state), device=state.device)
            asked = state[rows, (running.token_map.answer_start - 1 - start).to(state.device)].float()
            strongest = condition.dictionary.assign(asked)
            self._passing = strongest >= 0 if condition.concept is None else strongest == condition.concept
            if condition.threshold is not None:
                self._passing = condition.dictionary.transform(asked)[:, condition.concept].abs() > condition.threshold
            if self.steering.by_concept:
                vector = vector[strongest.clamp_min(0)]
                self._passing &= vector.any(dim=-1)
            self.passed += int(self._passing.sum())
        self.samples += len(state)
        vector = vector.unsqueeze(-2)
        if self.steering.mode == "add":
            # α s in the precision of the states, rounded once.
            vector = vector if len(self.steering.strengths) > 1 else self.steering.strengths[0] * vector
            vector = vector.to(state.dtype)
        self._vector = vector
        self._pass = running

    def _mask(self, token_map: TokenMap, start: int, length: int) -> Tensor | bool:
        """The columns from `start` on to change [B, length]; all or none of them where that is known without a mask."""
        is_image = self.site.positions == "image"
        if self.selector is not None:
            if start >= token_map.roles.shape[1] and (known := self.selector.while_generating) is not None:
                return known and not is_image
            selected = self.selector.mask(token_map, start, length)
            return selected & (token_map.window(start, length) == Role.IMAGE) if is_image else selected
        assert isinstance(self.steering.positions, Tensor)
        chosen = columns_of(self.steering.positions, token_map, start, length)
        return chosen & (token_map.window(start, length) == Role.IMAGE) if is_image else chosen

    def _alpha(self, token_map: TokenMap, start: int, length: int, device: torch.device) -> Tensor | float:
        """α, the same everywhere or of each position [B, length, 1]."""
        strengths = self.steering.strengths
        if len(strengths) == 1:
            return strengths[0]
        columns = torch.arange(start, start + length, device=device)
        token = columns - (token_map.answer_start[:, None].to(device) - 1)
        return torch.tensor(strengths, device=device)[token.clamp(0, len(strengths) - 1)][:, :, None]

    def _changed(self, state: Tensor, alpha: Tensor | float) -> Tensor:
        """All states as they become: f + α (f′ − f)."""
        if self.steering.mode == "add":
            scaled = self._vector if isinstance(alpha, float) else (alpha * self._vector.float()).to(state.dtype)
            return state + scaled
        # In float32: the product of long vectors in half precision would leave much of a direction.
        full = state.float()
        if self.steering.mode == "replace":
            return torch.lerp(full, self._vector.expand_as(full), torch.as_tensor(alpha, device=state.device)).to(
                state.dtype
            )
        direction = normalize(self._vector, dim=-1)
        along = (full * direction).sum(dim=-1, keepdim=True)
        if self.steering.mode == "clamp":
            along = along - torch.linalg.vector_norm(self._vector, dim=-1, keepdim=True)
        return (full - alpha * along * direction).to(state.dtype)

    def _check_shapes(self, state: Tensor, columns: int) -> None:
        samples, length, width = state.shape
        if length != columns:
            raise ValueError(
                f"site {self.site.name!r} has {length} states a sample where there are {columns} positions; choose a "
                "module of the language model, or `projector`"
            )
        vector, positions = self.steering.vector, self.steering.positions
        if vector.shape[-1] != width:
            raise ValueError(
                f"steering vector of width {vector.shape[-1]} at {self.site.name!r}, where states have width {width}; "
                "it was made for another model"
            )
        given = [("vectors", vector)] if vector.ndim == 2 and not self.steering.by_concept else []
        given += [("masks of positions", positions)] if isinstance(positions, Tensor) else []
        for name, rows in given:
            if len(rows) != samples:
                raise ValueError(f"steering with {len(rows)} {name} for a batch of {samples} samples; give one each")


def columns_of(positions: Tensor, token_map: TokenMap, start: int, length: int) -> Tensor:
    """The columns from `start` on where a mask of positions holds [B, length]; never padding.

    Args:
        positions: Boolean mask over each sample's sequence without padding [B, L]; behind its end it does not hold.
        token_map: What stands where.
        start: First column.
        length: Number of columns.
    """
    present = token_map.window(start, length) != Role.PAD
    chosen = positions.to(present.device)
    indices = torch.arange(start, start + length, device=present.device) - token_map.first_column[:, None]
    within = (indices >= 0) & (indices < chosen.shape[1])
    return present & within & chosen.gather(1, indices.clamp(0, chosen.shape[1] - 1))


@contextmanager
def intervening(site: Site, steering: Steering, current: Callable[[], RunningPass | None]) -> Iterator[Applied]:
    """Apply one intervention within the context.

    Args:
        site: The resolved site.
        steering: What to change, and where.
        current: Gives the running pass.

    Raises:
        ValueError: The site is in the vision tower.
    """
    if site.positions == "patches":
        raise ValueError(
            f"site {site.name!r}: hidden states can be changed at sites of the language model only (projector, lm.*)"
        )
    applied = Applied(site, steering, current)
    handle = attach(site, applied)
    try:
        yield applied
    finally:
        handle.remove()
