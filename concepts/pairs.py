"""Pairs of states, resampled and paired anew: shifts as they might have been.

Notation: M pairs of states, rows a of the original and b of the destination, of S samples; K concepts, D hidden size;
    δ_m = b_m − a_m, A_k the n_k rows of a concept, Δ_k the average of their δ_m; π a permutation.

Rows of one sample (the visual tokens of one picture, say) are not independent: whole samples are drawn, swapped and
permuted. The random numbers of each draw come in turn from one generator on the CPU, so that it makes no difference how
many draws are held at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize
from tqdm import tqdm

from ._averages import Average, averaged, rows_of
from .causal import random_directions
from .shift import concept_shift, inverse, paired_states

# Values that are held at a time: 8 MiB of float32, because the system takes long to hand out more.
_VALUES = 2**21
# Random numbers that are held at a time.
_RANDOM = 2**24
# Columns of states that are summed at a time, so that those of all rows stay in the cache of a core.
_COLUMNS = 128
# ‖b − a‖² below this share of ‖b‖² + ‖a‖² is what rounding leaves of it in float64; so with their means.
_NO_DIFFERENCE = 1e-13
# Rows of a concept that are paired within it: that takes their square, and more would say little more.
_PAIRED = 4096
# Progress is shown of what takes longer than these seconds.
_QUIET = 3.0


class Permutation:
    """Permutes whole samples.

    The rows of a sample take the places of those of another one in their order; where it has fewer, they come again
    from the first, and where it has more, the last stay out. Of samples with equally many rows, that is a permutation.

    Args:
        sample: sample of each row, [n], integer.
    """

    def __init__(self, sample: Tensor) -> None:
        _, self._sample, self._sizes = torch.unique(sample, return_inverse=True, return_counts=True)
        self._rows = self._sample.argsort(stable=True)
        self._starts = self._sizes.cumsum(0) - self._sizes
        self._rank = torch.empty_like(self._rows)
        self._rank[self._rows] = torch.arange(len(sample)) - self._starts.repeat_interleave(self._sizes)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Which row takes the place of each, [count, n], int64."""
        drawn = torch.stack([torch.randperm(len(self._sizes), generator=generator) for _ in range(count)])
        other = drawn[:, self._sample]
        taken: Tensor = self._rows[self._starts[other] + self._rank % self._sizes[other]]
        return taken


class Pairs:
    """Paired states, one block for each concept.

    Args:
        original: a, [M, D].
        destination: b, [M, D].
        assignment: concept of each row in the original, [M], integer; −1 for one that activates none.
        n_concepts: K.
        average: what Δ_k is of the δ_m.
        samples: sample that each row belongs to, [M], integer; by default each row is one.

    Attributes:
        a, b: the states, [M, D], float32, on one device.
        shift: Δ_k and its measures.
        rows: A_k, K tensors [n_k], int64, on the CPU.
        deltas: δ of each concept, K tensors [n_k, D].
        samples: number from 0 to S − 1 of the sample of each row of each concept, K tensors [n_k], int64, on the CPU.

    Raises:
        ValueError: as `concept_shift`, or if `samples` does not fit.
    """

    def __init__(
        self,
        original: Tensor,
        destination: Tensor,
        assignment: Tensor,
        n_concepts: int,
        average: Average,
        samples: Tensor | None,
    ) -> None:
        self.shift = concept_shift(original, destination, assignment, n_concepts, average)
        self.a, self.b = paired_states(original, destination)
        self.average = average
        M = len(self.a)
        samples = torch.arange(M) if samples is None else samples
        if samples.is_floating_point() or samples.shape != (M,):
            raise ValueError(
                f"`samples` must be an integer tensor [{M}], the sample that each row belongs to, "
                f"got {samples.dtype} {list(samples.shape)}"
            )
        self._sample = torch.unique(samples.cpu(), return_inverse=True)[1]
        self._n_samples = int(self._sample.max()) + 1
        self.rows = rows_of(assignment, n_concepts, M)
        self.deltas = [self.b[own] - self.a[own] for own in (rows.to(self.a.device) for rows in self.rows)]
        self.samples = [self._sample[own] for own in self.rows]

    def counts(self, count: int, seed: int) -> Iterator[Tensor]:
        """How often each of the S samples is drawn, with replacement, [R, S], int64, in chunks."""
        generator, S = torch.Generator().manual_seed(seed), self._n_samples
        for size in self._chunks(count, self.a.shape[1], "resampling pairs"):
            drawn = [torch.randint(S, (S,), generator=generator).bincount(minlength=S) for _ in range(size)]
            yield torch.stack(drawn)

    def swapped(self, touching: list[Tensor], count: int, seed: int) -> tuple[Tensor, Tensor]:
        """‖average of δ‖ over some rows of each concept, with original and destination swapped in random samples.

        Args:
            touching: the rows of each concept, K tensors, on the CPU.
            count: number of draws R.
            seed: seed of the draws.

        Returns:
            What was observed, [K], and the draws, [R, K].
        """
        generator, S = torch.Generator().manual_seed(seed), self._n_samples
        signs = torch.stack([torch.randint(2, (S,), generator=generator).to(torch.int8) for _ in range(count)])
        signs = 2 * signs - 1
        observed, chance = [], []
        for rows in tqdm(touching, "swapping original and destination", leave=False, delay=_QUIET):
            own = rows.to(self.a.device)
            delta, of_rows = self.b[own] - self.a[own], signs[:, self._sample[rows]]
            observed.append(averaged(delta, self.average).norm())
            parts = torch.split(of_rows, _at_once(max(delta.shape)))
            chance.append(torch.cat([_weighted(delta, part.long(), self.average).norm(dim=1) for part in parts]))
        return torch.stack(observed), torch.stack(chance, dim=1)

    def weighted(self, k: int, weights: Tensor) -> Tensor:
        """Shifts of a concept when each δ_m comes |w| times, with the sign of w.

        Args:
            k: concept.
            weights: w of each sample in each draw, [R, S], int64.

        Returns:
            Shifts, [R, D]; 0 where all weights are.
        """
        return _weighted(self.deltas[k], weights[:, self.samples[k]], self.average)

    def resampled(self, count: int, seed: int) -> Iterator[Tensor]:
        """Shifts of samples drawn with replacement, [R, K, D], in chunks; NaN where a draw leaves a concept none."""
        for counts in self.counts(count, seed):
            shifts = torch.stack([self.weighted(k, counts) for k in range(len(self.rows))], dim=1)
            lost = torch.stack([(counts[:, own] == 0).all(dim=1) for own in self.samples], dim=1)
            yield shifts.masked_fill_(lost.to(shifts.device)[:, :, None], torch.nan)

    def paired_anew(self, count: int, seed: int) -> Iterator[Tensor]:
        """Shifts with the destination's states permuted over all samples, [R, K, D], in chunks."""
        generator, permutation = torch.Generator().manual_seed(seed), Permutation(self._sample)
        chunks = self._chunks(count, self.shift.vectors.numel(), "pairing at random")
        if self.average != "mean":
            for size in chunks:
                yield torch.stack([self._averages(order) for order in permutation.draw(size, generator)])
            return
        # Without their mean, which is in all sums alike, and would cost digits.
        means = self.b.mean(dim=0, dtype=torch.float64).float()
        columns = torch.split(self.b, _COLUMNS, dim=1), torch.split(means, _COLUMNS)
        parts = [(part - mean).contiguous() for part, mean in zip(*columns, strict=True)]
        flat = torch.cat(self.rows)
        sizes = self.shift.counts.clamp_min(1)[:, None]
        rest = self.shift.vectors - self._sums(parts, flat[None])[0] / sizes
        for size in chunks:
            yield self._sums(parts, permutation.draw(size, generator)[:, flat]).div_(sizes).add_(rest)

    def random(self, count: int, seed: int) -> Iterator[Tensor]:
        """Shifts of the same norms in random directions, as the destination's states vary, [R, K, D], in chunks."""
        # Always alike: in other pieces, they would be others.
        generator, size = torch.Generator().manual_seed(seed), max(1, _RANDOM // max(self.b.shape))
        for start in range(0, count, size):
            directions = random_directions(self.b, min(size, count - start), generator)
            for part in torch.split(directions, _at_once(self.shift.vectors.numel())):
                yield part[:, None] * self.shift.magnitude[:, None]

    def consistencies(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Mean of cos(b_π(m) − a_m, mean of them) over A_k, π permuting the samples of A_k.

        Of a concept with very many rows, over the rows of some of its samples.

        Args:
            count: number of draws R.
            seed: seed of the draws.

        Returns:
            What was observed, [K], and the draws, [R, K], float64.
        """
        generator = torch.Generator().manual_seed(seed)
        found = []
        for k in tqdm(range(len(self.samples)), "pairing within concepts", leave=False, delay=_QUIET):
            kept = self._some(k, generator)
            orders = torch.cat(
                [torch.arange(len(kept))[None], Permutation(self.samples[k][kept]).draw(count, generator)]
            )
            found.append(self._mean_cosines(k, kept.to(self.a.device), orders.to(self.a.device)))
        both = torch.stack(found, dim=1)
        return both[0], both[1:]

    def _some(self, k: int, generator: torch.Generator) -> Tensor:
        """Places among the rows of a concept: all, or those of so many whole samples as can be paired."""
        own = self.samples[k]
        if len(own) <= _PAIRED:
            return torch.arange(len(own))
        names, sizes = torch.unique(own, return_counts=True)
        order = torch.randperm(len(names), generator=generator)
        fitting = int((sizes[order].cumsum(0) <= _PAIRED).sum())
        return torch.isin(own, names[order[: max(2, fitting)]]).nonzero().flatten()

    def _mean_cosines(self, k: int, kept: Tensor, orders: Tensor) -> Tensor:
        """Mean cosine of b_π(m) − a_m with their mean for each π, [R]; `orders` π(m) [R, n] among the rows kept."""
        own = self.deltas[k][kept].double()
        a, b = (states[self.rows[k].to(states.device)[kept]].double() for states in (self.a, self.b))
        # b_j − a_m is had from products; a large common part would cost digits.
        a, b = a - a.mean(dim=0), b - a.mean(dim=0)
        squares, scale = b.square().sum(dim=1), (a.square() + b.square()).sum(dim=1).mean()
        means = _means(b, orders)
        directions = normalize(means.where(means.square().sum(dim=1, keepdim=True) > _NO_DIFFERENCE * scale, 0), dim=1)
        along_a, along_b = (directions @ states.T for states in (a, b))
        along_b = along_b.expand(len(orders), -1)
        everyone = torch.arange(len(a), device=a.device)
        total = torch.zeros(len(orders), dtype=torch.float64, device=a.device)
        for rows in torch.split(everyone, _at_once(max(*orders.shape, 1))):
            both = a[rows].square().sum(dim=1, keepdim=True) + squares
            apart = both - 2 * a[rows] @ b.T
            lengths = apart.where(apart > _NO_DIFFERENCE * both, 0).sqrt()
            lengths[everyone[: len(rows)], rows] = own[rows].norm(dim=1)
            partners = orders[:, rows]
            total += torch.einsum(
                "rm,mr->r", along_b.gather(1, partners) - along_a[:, rows], inverse(lengths).gather(1, partners.T)
            )
        return total / max(len(a), 1)

    def _sums(self, parts: list[Tensor], orders: Tensor) -> Tensor:
        """Sums of rows over the blocks of each order [R, Σ n_k], [R, K, D]; `parts` are columns of the rows."""
        sizes = self.shift.counts.repeat(len(orders))
        index = orders.flatten().to(sizes.device)
        sums = [embedding_bag(index, part, sizes.cumsum(0) - sizes, mode="sum") for part in parts]
        return torch.cat(sums, dim=1).view(len(orders), *self.shift.vectors.shape)

    def _averages(self, order: Tensor) -> Tensor:
        """Shifts with the destination's states in another order [M], [K, D]."""
        device = self.a.device
        pairs = ((own.to(device), order[own].to(device)) for own in self.rows)
        return torch.stack([averaged(self.b[other] - self.a[own], self.average) for own, other in pairs])

    def _chunks(self, count: int, width: int, title: str) -> Iterator[int]:
        """Numbers of draws to hold at a time, each of so many values."""
        # Of what is no mean, every draw goes through all states.
        size = min(_at_once(width), max(1, _RANDOM // len(self.a))) if self.average == "mean" else 1
        with tqdm(total=count, desc=title, leave=False, delay=_QUIET) as bar:
            for start in range(0, count, size):
                yield min(size, count - start)
                bar.update(min(size, count - start))


def _weighted(delta: Tensor, weights: Tensor, average: Average) -> Tensor:
    """Averages of δ [n, D] when each comes |w| times, with the sign of w: [R, n], int64 → [R, D]."""
    weights = weights.to(delta.device)
    if average == "mean":
        return weights.to(delta) @ delta / weights.abs().sum(dim=1, keepdim=True).clamp_min(1)
    drawn = ((delta * w.sign()[:, None]).repeat_interleave(w.abs(), dim=0) for w in weights)
    return torch.stack([averaged(rows, average) for rows in drawn])


def _means(rows: Tensor, orders: Tensor) -> Tensor:
    """Mean of the rows [n, D] that each order [R, n] takes, [R, D]; [1, D] where all take each row once."""
    if bool((orders.sort(dim=1).values == torch.arange(len(rows), device=orders.device)).all()):
        return rows.mean(dim=0, keepdim=True)
    counts = torch.zeros(orders.shape, dtype=rows.dtype, device=rows.device)
    return counts.scatter_add_(1, orders, torch.ones_like(counts)) @ rows / len(rows)


def _at_once(width: int) -> int:
    return max(1, _VALUES // width)
