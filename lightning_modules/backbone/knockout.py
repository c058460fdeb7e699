"""Forbids attention between positions while the model runs (METHODS §5), by hooks that never outlive their context.

A block's attention is given a mask already: causal, for padding, for a sliding window, or none where SDPA is causal by
itself. A knockout forbids more, in whatever form that mask has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .generation import Generation
from .interventions import RunningPass, columns_of
from .selectors import Selector
from .sites import Site
from .token_map import TokenMap

# States in full precision that differ by no more, relative to their length, are equal but for rounding.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class AttentionKnockout:
    """Target positions may not attend to source positions: −∞ is added to their attention scores before the softmax.

    Positions are a selector, or a boolean mask over each sample's sequence without padding [B, L]. What a target knows
    about a source from earlier blocks, or through positions that are neither, it keeps.

    Attributes:
        sources: The positions that are not attended to (keys).
        targets: The positions that do not attend to them (queries). Each must keep a position that it may attend to.
        blocks: Numbers of the blocks of the language model in which this holds, from 0.
    """

    sources: str | Tensor
    targets: str | Tensor
    blocks: Sequence[int]

    def __post_init__(self) -> None:
        """Refuse what could not be applied to any model."""
        if not self.blocks:
            raise ValueError("`blocks` must name at least one block to knock attention out of, got none")
        for name, positions in (("sources", self.sources), ("targets", self.targets)):
            if isinstance(positions, Tensor):
                if positions.dtype != torch.bool or positions.ndim != 2:
                    raise ValueError(
                        f"`{name}`: a mask of positions must be boolean [B, L], got {positions.dtype} "
                        f"{list(positions.shape)}"
                    )
            elif Selector.parse(positions).needs_answer:
                raise ValueError(
                    f"`{name}`: positions {positions!r} are known only after generation; give a role, a range, or a "
                    "mask of positions"
                )


class _Positions:
    """Where a selector or a mask holds."""

    def __init__(self, positions: str | Tensor) -> None:
        self.given = positions if isinstance(positions, Tensor) else Selector.parse(positions)

    def never_after(self, token_map: TokenMap, start: int) -> bool:
        """Whether it is known to hold nowhere from column `start` on, without a mask."""
        behind_prompt = start >= token_map.roles.shape[1]
        return behind_prompt and isinstance(self.given, Selector) and self.given.while_generating is False

    def mask(self, token_map: TokenMap, start: int, length: int) -> Tensor:
        """The columns from `start` on where it holds [B, length]; never padding."""
        if isinstance(self.given, Selector):
            return self.given.mask(token_map, start, length)
        if len(self.given) != (samples := len(token_map.roles)):
            raise ValueError(
                f"attention knockout with {len(self.given)} masks of positions for a batch of {samples} samples; give "
                "one each"
            )
        return columns_of(self.given, token_map, start, length)


class _Applied:
    """One knockout at work on a model.

    Blocks that are given one and the same mask in a pass are given one and the same new mask.
    """

    def __init__(self, knockout: AttentionKnockout, current: Callable[[], RunningPass | None]) -> None:
        self.sources, self.targets = _Positions(knockout.sources), _Positions(knockout.targets)
        self.current = current
        self._step: tuple[RunningPass, int] | None = None
        self._made: dict[int, tuple[Tensor | None, Tensor | None]] = {}

    def attach(self, block: Site) -> RemovableHandle:
        """Hook a block's attention.

        Raises:
            ValueError: It has no attention over its own sequence.
        """
        attention = self_attention(block)
        signature = inspect.signature(type(attention).forward)

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            running = self.current()
            if running is None:
                raise RuntimeError(
                    "a model with interventions must be run through VisionLanguageModel.generate, .read or .logits"
                )
            call = signature.bind(module, *args, **kwargs)
            states, given = call.arguments["hidden_states"], call.arguments.get("attention_mask")
            start = running.advance(before, states.shape[1])
            self._check_columns(block, running, start, states.shape[1])
            if self._step is None or self._step[0] is not running or self._step[1] != start:
                self._step, self._made = (running, start), {}
            # The mask is kept with what became of it, so that no other one can take its id in this step.
            if id(given) not in self._made:
                mask = _implicit(states, start, module.is_causal) if given is None else given
                self._made[id(given)] = given, self._forbidding(mask, running.token_map, start, block)
            changed = self._made[id(given)][1]
            if changed is None:
                return None
            call.arguments["attention_mask"] = changed.to(states.device)
            return call.args[1:], call.kwargs

        return attention.register_forward_pre_hook(before, with_kwargs=True)

    def _forbidding(self, given: Tensor, token_map: TokenMap, start: int, block: Site) -> Tensor | None:
        """A mask [B or 1, heads or 1, T, K] that also forbids what is knocked out; nothing where that is nothing.

        Args:
            given: True where a query may attend to a key, or an additive mask.
            token_map: What stands where.
            start: Column of the first query.
            block: Whose mask it is, for the error.
        """
        if self.targets.never_after(token_map, start):
            return None
        queries, keys = given.shape[-2:]
        # The keys end with the last query; a window has lost the first ones, and a cache of fixed size has room behind.
        targets = self.targets.mask(token_map, start, queries).to(given.device)
        sources = self.sources.mask(token_map, max(0, start + queries - keys), keys).to(given.device)
        forbidden = targets[:, None, :, None] & sources[:, None, None, :]
        if not forbidden.any():
            return None
        if given.dtype == torch.bool:
            changed = visible = given & ~forbidden
        else:
            changed = torch.where(forbidden, float("-inf"), given)
            visible = changed > torch.finfo(given.dtype).min
        blind = targets & ~visible.any(dim=-1).all(dim=1)
        if blind.any():
            sample, column = blind.nonzero()[0].tolist()
            position = start + column - int(token_map.first_column[sample])
            raise ValueError(
                f"attention knockout at {block.name!r}: position {position} of sample {sample} would attend to "
                "nothing; leave it a position that is no source, such as itself or the first one"
            )
        return changed

    def _check_columns(self, block: Site, running: RunningPass, start: int, columns: int) -> None:
        expected = running.token_map.roles.shape[1] - start
        if start == running.first and columns != expected:
            raise ValueError(
                f"{block.name!r} has {columns} states a sample where there are {expected} positions, so that attention "
                "between positions cannot be knocked out of it"
            )


def _implicit(states: Tensor, start: int, is_causal: bool) -> Tensor:
    """What attention without a mask lets T queries attend to [1, 1, T, start + T]; one query, to everything."""
    queries = states.shape[1]
    everything = torch.ones(1, 1, queries, start + queries, dtype=torch.bool, device=states.device)
    return everything.tril(start) if is_causal else everything


def self_attention(block: Site) -> nn.Module:
    """The module by which the positions of a block attend to each other.

    It is known by being given an attention mask and having a say in whether it is causal; linear attention and
    convolutions, which are given a mask of padding, have none.

    Raises:
        ValueError: There is none, or there is attention to something else too.
    """
    masked = [
        (module, parameters)
        for module in block.module.modules()
        if "attention_mask" in (parameters := inspect.signature(type(module).forward).parameters)
        and module is not block.module
    ]
    found = [module for module, _ in masked if hasattr(module, "is_causal")]
    if len(found) > 1 or any("cross_attention_states" in parameters for _, parameters in masked):
        raise ValueError(
            f"attention knockout: {block.name!r} has cross-attention, whose keys are no positions of the sequence; "
            "leave this block out"
        )
    if not found:
        raise ValueError(
            f"attention knockout: {block.name!r} ({', '.join(name for name, _ in block.module.named_children())}) has "
            "no attention that a mask of positions could knock out; leave this block out"
        )
    return found[0]


@contextmanager
def knocking_out(
    blocks: Iterable[Site], knockout: AttentionKnockout, current: Callable[[], RunningPass | None], implementation: str
) -> Iterator[None]:
    """Apply one knockout within the context.

    Args:
        blocks: The blocks it names.
        knockout: What to forbid.
        current: Gives the running pass.
        implementation: How the model computes attention.

    Raises:
        ValueError: A block has no attention over its own sequence, or the implementation takes no mask of positions.
    """
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attention knockout needs a mask for each query, which {implementation!r} does not take; load the model "
            "with `attention: sdpa`"
        )
    applied = _Applied(knockout, current)
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(applied.attach(block).remove)
        yield


def changed(before: Generation, after: Generation, site: str) -> Tensor:
    """Whether an intervention reached what a model says first: the state that predicts the answer's first token.

    A mask of another form makes attention round otherwise; that is no change. In half precision it cannot be told from
    a small one, so that there every difference counts.

    Args:
        before: Answers to some prompts.
        after: Answers to the same prompts, intervened.
        site: Where both were read: the last block, or `lm.norm`.

    Returns:
        Boolean [B].
    """
    first, second = (
        one.states[site][torch.arange(len(one.texts)), (one.token_map.answer_start - 1).cpu()]
        for one in (before, after)
    )
    lengths, differences = (torch.linalg.vector_norm(one.float(), dim=1) for one in (first, second - first))
    moved: Tensor = differences > (_ROUNDING * lengths if first.dtype == torch.float32 else 0)
    return moved
