"""The logit lens: softmax(unembedding(norm(h))) of every layer and position (METHODS §5), read while the model runs.

Notation: L layers, N positions of all samples of a batch, k tokens of highest probability, W tokens that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .hooks import attach
from .interventions import RunningPass
from .selectors import Selector
from .sites import Site
from .structure import Unembedding
from .token_map import TokenMap

# Logits that are in memory at a time, in bytes: as the model gives them, and in float32.
_CHUNK = 2**28


@dataclass(frozen=True)
class LensQuery:
    """What to decode.

    Attributes:
        layers: Names of sites, `lm.embed` and `lm.block.k`, in order.
        top_k: Tokens of highest probability to keep.
        tokens: Ids of W tokens whose largest probability over layers is wanted everywhere.
        positions: `all`, or `image` for visual tokens only.
    """

    layers: tuple[str, ...]
    top_k: int = 5
    tokens: tuple[int, ...] = ()
    positions: str = "all"


@dataclass
class LensReading:
    """What the layers of one batch decode to; positions in the order of samples, and of a sample's sequence.

    Attributes:
        layers: Names of the L sites.
        samples: Row of the batch of each position [N].
        positions: Position in the sample's sequence without padding [N].
        token_ids: What stands there [N].
        roles: `Role` of each position [N].
        image_index: Number of the visual token there, −1 elsewhere [N].
        top_ids: Tokens of highest probability [L, N, k], the highest first.
        top_probabilities: Their probabilities [L, N, k] in float32.
        token_probabilities: Of the tokens that were asked for, the largest over layers [N, W] in float32.
    """

    layers: tuple[str, ...]
    samples: Tensor
    positions: Tensor
    token_ids: Tensor
    roles: Tensor
    image_index: Tensor
    top_ids: Tensor
    top_probabilities: Tensor
    token_probabilities: Tensor


class _Rows(NamedTuple):
    """States of some positions at one layer, and where they are from."""

    layer: int
    samples: Tensor
    columns: Tensor
    states: Tensor


class _Decoded(NamedTuple):
    """What some rows decode to: layer, sample and column of each [n], tokens and their probabilities [n, k]."""

    layers: Tensor
    samples: Tensor
    columns: Tensor
    top_ids: Tensor
    top_probabilities: Tensor


class LensReader:
    """Decodes the states of several layers over one generation, while the model runs.

    States wait until there are enough of them for a chunk, of whatever layers and passes they are, and are gone once it
    is decoded: memory does not grow with layers, positions or samples, but for the few tokens that are kept.

    Args:
        query: What to decode.
        sites: The resolved sites of its layers.
        norm: The final norm.
        unembed: The unembedding.
        current: Gives the running pass.

    Raises:
        ValueError: A site is none of the residual stream, or there are fewer tokens than are to be kept.
    """

    def __init__(
        self,
        query: LensQuery,
        sites: Sequence[Site],
        norm: nn.Module,
        unembed: Unembedding,
        current: Callable[[], RunningPass | None],
    ) -> None:
        tokens = unembed.shape[0]
        for site in sites:
            if site.name != "lm.embed" and not site.name.startswith("lm.block."):
                raise ValueError(f"the logit lens reads lm.embed and lm.block.k, not {site.name!r}; choose among those")
        if not 1 <= query.top_k <= tokens:
            raise ValueError(f"`top_k` must be one of 1 … {tokens}, the number of tokens, got {query.top_k}")
        self.query = query
        self.sites = sites
        # Not called as modules: somebody may read or steer what the model itself does there.
        self._norm = norm.forward
        self._unembed = replace(unembed, head=unembed.head.forward)
        self.current = current
        self._selector = Selector.parse(query.positions)
        self._chunk = self._room = max(1, _CHUNK // (8 * tokens))
        self._seen = [0] * len(sites)
        self._window: tuple[tuple[int, int], Tensor, Tensor] | None = None
        self._waiting: list[_Rows] = []
        self._decoded: list[_Decoded] = []
        # Of the tokens that are asked for, over the layers so far [samples, columns, W].
        self._largest = torch.zeros(0, 0, len(query.tokens))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Decode within the context. Enter after interventions, so that what they change is what is read."""
        with ExitStack() as stack:
            for layer, site in enumerate(self.sites):
                stack.callback(attach(site, partial(self._take, layer)).remove)
            yield

    def reading(self, token_map: TokenMap) -> LensReading:
        """All that was decoded, on the CPU.

        Args:
            token_map: What stands where, with the answers.

        Raises:
            ValueError: A layer has not as many states as the sequence has positions.
        """
        self._decode()
        lengths = torch.tensor([len(answer) for answer in token_map.answers], device=token_map.roles.device)
        ends = token_map.answer_start + lengths - 1
        longest = int(ends.max())
        for site, seen in zip(self.sites, self._seen, strict=True):
            if seen < longest:
                raise ValueError(
                    f"site {site.name!r} has {seen} states a sample where the sequence has {longest} positions; leave "
                    "this layer out"
                )
        width = token_map.roles.shape[1]
        # The last token of an answer has no state, and what a model reads behind it is nothing of the sample.
        has_state = torch.arange(width, device=ends.device) < ends[:, None]
        kept = (self._selector.mask(token_map, 0, width) & has_state).cpu()
        samples, columns = kept.nonzero(as_tuple=True)
        shape = len(self.sites), len(samples)
        top_ids = torch.zeros(*shape, self.query.top_k, dtype=torch.long)
        top_probabilities = torch.zeros(*shape, self.query.top_k)
        token_probabilities = torch.zeros(len(samples), len(self.query.tokens))
        if self._decoded:
            number = torch.full(kept.shape, -1).masked_scatter(kept, torch.arange(len(samples)))
            decoded = _Decoded(*(torch.cat(parts).cpu() for parts in zip(*self._decoded, strict=True)))
            # Where other processes wait for each other, a model goes on behind the last token of all.
            at = torch.where(decoded.columns < width, number[decoded.samples, decoded.columns.clamp_max(width - 1)], -1)
            rows = at >= 0
            place = decoded.layers[rows], at[rows]
            top_ids[place] = decoded.top_ids[rows]
            top_probabilities[place] = decoded.top_probabilities[rows]
        known = columns < self._largest.shape[1]
        token_probabilities[known] = self._largest.cpu()[samples[known], columns[known]]
        return LensReading(
            layers=tuple(site.name for site in self.sites),
            samples=samples,
            positions=columns - token_map.first_column.cpu()[samples],
            token_ids=token_map.token_ids.cpu()[kept],
            roles=token_map.roles.cpu()[kept],
            image_index=token_map.image_index.cpu()[kept],
            top_ids=top_ids,
            top_probabilities=top_probabilities,
            token_probabilities=token_probabilities,
        )

    def _take(self, layer: int, state: Tensor) -> None:
        """Take the wanted rows of a state [B, T, D] that a layer gives."""
        running = self.current()
        assert running is not None
        roles = running.token_map.roles
        start = self._seen[layer]
        if not len(self._largest):
            self._largest = self._largest.new_zeros(len(roles), 0, self._largest.shape[2])
        if state.ndim != 3 or len(state) != len(roles) or (not start and state.shape[1] > roles.shape[1]):
            raise ValueError(
                f"site {self.sites[layer].name!r} has states of shape {list(state.shape)} where there are "
                f"{len(roles)} samples of {roles.shape[1]} positions, so that it is not known what stands where"
            )
        self._seen[layer] += state.shape[1]
        samples, columns = self._chosen(running.token_map, start, state.shape[1])
        taken = 0
        while taken < len(samples):
            piece = slice(taken, taken + self._room)
            rows = state[samples[piece].to(state.device), columns[piece].to(state.device) - start]
            # A block may lie on another device than the one before it.
            self._waiting.append(_Rows(layer, samples[piece], columns[piece], rows.to(roles.device)))
            taken += len(rows)
            self._room -= len(rows)
            if not self._room:
                self._decode()

    def _chosen(self, token_map: TokenMap, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Samples and columns of the wanted positions among those of a pass; found once for all layers."""
        if self._window is None or self._window[0] != (start, length):
            mask = self._selector.mask(token_map, start, length)
            samples, columns = mask.nonzero(as_tuple=True)
            self._window = (start, length), samples, columns + start
        return self._window[1:]

    def _decode(self) -> None:
        """Decode the rows that wait."""
        if not self._waiting:
            return
        waiting, self._waiting, self._room = self._waiting, [], self._chunk
        logits = self._unembed(self._norm(torch.cat([rows.states for rows in waiting])))
        values, ids = logits.topk(self.query.top_k)
        if logits.dtype != torch.float32:
            _first_of_equals(logits, values, ids)
        logits, values = logits.float(), values.float()
        asked = logits[:, list(self.query.tokens)]
        # In place, and with the maximum that is known already: log-sum-exp needs no second tensor of this size.
        highest = values[:, :1]
        total = highest + logits.sub_(highest).exp_().sum(dim=-1, keepdim=True).log()
        sizes = torch.tensor([len(rows.states) for rows in waiting])
        layers = torch.tensor([rows.layer for rows in waiting]).repeat_interleave(sizes).to(ids.device)
        samples = torch.cat([rows.samples for rows in waiting])
        columns = torch.cat([rows.columns for rows in waiting])
        self._decoded.append(_Decoded(layers, samples, columns, ids, (values - total).exp()))
        if self.query.tokens:
            self._keep_largest(samples, columns, (asked - total).exp())

    def _keep_largest(self, samples: Tensor, columns: Tensor, probabilities: Tensor) -> None:
        """Note probabilities [n, W] of some rows where no layer has had larger ones."""
        tokens, more = probabilities.shape[1], int(columns.max()) + 1 - self._largest.shape[1]
        if more > 0:
            room = probabilities.new_zeros(len(self._largest), more, tokens)
            self._largest = torch.cat([self._largest.to(room.device), room], dim=1)
        rows = samples * self._largest.shape[1] + columns
        flat = self._largest.view(-1, tokens)
        flat.scatter_reduce_(0, rows[:, None].expand_as(probabilities), probabilities, "amax")


def _first_of_equals(logits: Tensor, values: Tensor, ids: Tensor) -> None:
    """Put the token of smallest id first among those of highest logit, which in half precision are often several.

    Args:
        logits: Logits [n, tokens].
        values: The highest of them [n, k].
        ids: Their tokens [n, k]; changed in place.
    """
    numbers = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    first = torch.where(logits == values[:, :1], numbers, logits.shape[1]).amin(dim=1).long()
    # It may be among those that are kept already: then the two change places.
    place = (ids == first[:, None]).int().argmax(dim=1, keepdim=True)
    ids.scatter_(1, place, ids[:, :1].clone())
    ids[:, 0] = first
