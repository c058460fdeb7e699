"""The features that a dictionary is fitted on: in one tensor or in shards, of one process or of several."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ._validation import as_rows


class Rows:
    """N features of width D, read shard by shard as often as a fit needs them, and sums over all processes.

    Args:
        Z: features, [N, D], or an iterable of shards [n, D] that can be gone through several times (a list, or an
            object whose `__iter__` begins anew); only one shard is held at a time.
        distributed: `Z` holds the rows of this process only, and all processes of the default group call alike; the
            order of all rows is that of the processes.
        dtype: precision in which the rows are given.

    Attributes:
        n: number of rows N, over all processes.
        width: D.
        device: where the shards are.
        mean: mean row [D], float64.
        squares: Σ_n ‖z_n‖².
        longest: max_n ‖z_n‖.

    Raises:
        TypeError: if `Z` can be gone through only once.
        ValueError: if there is no row, a shard is no finite floating matrix, or shards differ in width or device.
    """

    def __init__(
        self, Z: Tensor | Iterable[Tensor], distributed: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        if isinstance(Z, Iterator):
            raise TypeError(
                "`Z` must be a tensor, or shards that can be gone through several times: give a list of them"
            )
        self._source: Iterable[Tensor] = [Z] if isinstance(Z, Tensor) else Z
        self.distributed = distributed
        self.dtype = dtype
        self.lengths: list[int] = []
        error = None
        try:
            total, self.squares, self.longest = self._scan()
        except ValueError as found:
            error = found
        self._fail_together(error)
        self.squares, self.longest = self._over_processes(self.squares, self.longest)
        counts = self._count_by_process()
        self.n = sum(counts)
        self._offset = sum(counts[: dist.get_rank()]) if distributed else 0
        (total,) = self.sums(total)
        self.mean = total / self.n

    def _scan(self) -> tuple[Tensor, float, float]:
        """Check every shard once; Σ z [D] and Σ ‖z‖² of this process, and the longest row of all."""
        total, squares, longest = torch.zeros(0), 0.0, 0.0
        single = isinstance(self._source, list) and len(self._source) == 1
        for number, shard in enumerate(self._source):
            as_rows(shard, "Z" if single else f"Z[{number}]")
            shard = shard.detach().to(self.dtype)
            if number == 0:
                self.width, self.device = shard.shape[1], shard.device
                total = torch.zeros(self.width, dtype=torch.float64, device=self.device)
            elif (shard.shape[1], shard.device) != (self.width, self.device):
                raise ValueError(
                    f"`Z[{number}]` must be [rows, {self.width}] on {self.device} as the first shard, got "
                    f"{list(shard.shape)} on {shard.device}"
                )
            self.lengths.append(len(shard))
            norms = squared_norms(shard)
            total += shard.sum(dim=0, dtype=torch.float64)
            squares += float(norms.sum())
            longest = max(longest, float(norms.max()) if len(shard) else 0.0)
        if not self.lengths:
            raise ValueError("`Z` must hold at least one shard, got none")
        return total, squares, longest**0.5

    def _fail_together(self, error: ValueError | None) -> None:
        """Raise on all processes where one of them found bad rows; else the others would wait for it."""
        errors = [None if error is None else str(error)]
        if self.distributed:
            errors *= dist.get_world_size()
            dist.all_gather_object(errors, None if error is None else str(error))
        found = [(process, text) for process, text in enumerate(errors) if text is not None]
        if found:
            process, text = found[0]
            raise ValueError(f"process {process}: {text}" if self.distributed else text) from error

    def _over_processes(self, squares: float, longest: float) -> tuple[float, float]:
        if not self.distributed:
            return squares, longest
        total = torch.tensor(squares, dtype=torch.float64, device=self.device)
        most = torch.tensor(longest, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(total), float(most)

    def agreed(self, part: Tensor) -> Tensor:
        """The first process's tensor on all, in place: machines may round differently."""
        if self.distributed:
            dist.broadcast(part, 0)
        return part

    def _count_by_process(self) -> list[int]:
        if not self.distributed:
            return [sum(self.lengths)]
        counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=self.device)
        counts[dist.get_rank()] = sum(self.lengths)
        dist.all_reduce(counts)
        return [int(count) for count in counts.tolist()]

    def __iter__(self) -> Iterator[Tensor]:
        """The shards of this process."""
        for shard in self._source:
            yield shard.detach().to(self.dtype)

    def sums(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Each tensor summed over the processes, in place."""
        if self.distributed:
            for part in parts:
                dist.all_reduce(part)
        return parts

    def gather(self, part: Tensor) -> Tensor:
        """The rows [n, ...] of all processes, in their order; n may differ."""
        if not self.distributed:
            return part
        parts: list[Tensor] = [part] * dist.get_world_size()
        dist.all_gather_object(parts, part.cpu())
        return torch.cat(parts).to(part.device)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows drawn at random without repetition, [min(count, N), D], the same on every process."""
        wanted = torch.randperm(self.n, generator=generator)[:count]
        return self.take(wanted)

    def take(self, wanted: Tensor) -> Tensor:
        """Rows by their number among all rows, [len(wanted), D], on every process."""
        out = torch.zeros(len(wanted), self.width, device=self.device, dtype=self.dtype)
        start = self._offset
        for shard in self:
            here = ((wanted >= start) & (wanted < start + len(shard))).nonzero().flatten()
            out[here.to(self.device)] = shard[(wanted[here] - start).to(self.device)]
            start += len(shard)
        self.sums(out)
        return out

    def distinct(self, at_least: int) -> bool:
        """Whether there are so many different rows; as a rule, the first few tell."""
        found = torch.zeros(0, self.width, device=self.device, dtype=self.dtype)
        for shard in self:
            # A few rows decide, unless most are equal; only then are all of them sorted.
            for part in (shard[: 4 * at_least], shard):
                found = torch.unique(torch.cat([found, part]), dim=0)[:at_least]
                if len(found) == at_least:
                    break
            if len(found) == at_least:
                break
        return len(torch.unique(self.gather(found), dim=0)) >= at_least


def squared_norms(X: Tensor) -> Tensor:
    """‖x_i‖² of each row, [N], float64: long sums of float32 would lose the last digits."""
    return X.square().sum(dim=1).double()
