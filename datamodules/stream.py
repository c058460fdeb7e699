"""Samples that are read while the model runs: shared among processes, shuffled and loaded as listed ones are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from random import Random
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset, Sampler

from .base import Item, read_item
from .sample import Batch, Sample

T = TypeVar("T")

_BUFFER = 1000


class StreamSampler(Sampler[T], Generic[T]):
    """One process's share of a stream: rows, where other samplers have numbers.

    Every process reads all rows, and keeps each n-th of n. So ids, limits and batches are those of a listed data set,
    which a split by files could not give, and no process runs out of batches before the others where `padded`.

    Args:
        rows: Opens the stream; its rows are the same in every process.
        rank: This process.
        processes: How many there are.
        padded: Give each process as many rows as the others, by repeating the first ones. Lightning does the same
            wherever processes wait for each other in each batch.
        seed: Shuffle with it and the epoch, in a buffer of 1000 rows; by default rows keep their order.
        epoch: The first epoch.
        skip: Rows to leave out of this process's share, in the first epoch.
    """

    def __init__(
        self,
        rows: Callable[[], Iterator[T]],
        rank: int,
        processes: int,
        padded: bool,
        seed: int | None = None,
        epoch: int = 0,
        skip: int = 0,
    ) -> None:
        self.rows = rows
        self.rank = rank
        self.processes = processes
        self.padded = padded
        self.seed = seed
        self.epoch = epoch
        self.skip = skip

    def set_epoch(self, epoch: int) -> None:
        """Shuffle otherwise; Lightning calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[T]:
        rows = self.rows()
        if self.seed is not None:
            rows = _shuffled(rows, Random(f"{self.seed} {self.epoch}"))
        skip, self.skip = self.skip, 0
        return islice(self._share(rows), skip, None)

    def _share(self, rows: Iterable[T]) -> Iterator[T]:
        first: list[T] = []
        count = 0
        for row in rows:
            if self.padded and len(first) < self.processes:
                first.append(row)
            if count % self.processes == self.rank:
                yield row
            count += 1
        missing = -count % self.processes if self.padded else 0
        for place in range(missing):
            if (count + place) % self.processes == self.rank:
                yield first[place % count]


class StreamedPictures(Dataset[Item], Generic[T]):
    """Reads the picture of whatever row it is given.

    Args:
        read: Gives a row's sample, and the content of its picture where that is at hand.
        skip_bad_images: Leave out unreadable pictures.
    """

    def __init__(self, read: Callable[[T], tuple[Sample, bytes | None]], skip_bad_images: bool) -> None:
        self.read = read
        self.skip_bad_images = skip_bad_images

    def __getitem__(self, row: T) -> Item:
        return read_item(*self.read(row), self.skip_bad_images)


class StreamLoader:
    """Batches of a stream.

    The rows are read once in each process, whatever the number of loader processes: those read and encode the
    pictures, batch by batch, in order. No `DataLoader` itself, for Lightning would keep all rows of a `predict`, as
    their numbers.

    Args:
        loader: A loader over a `StreamSampler`.
    """

    def __init__(self, loader: DataLoader[Item]) -> None:
        # Lightning tells its sampler the epoch.
        self.batch_sampler = loader.batch_sampler
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        # A generator, since Lightning tries `iter` beforehand, and loader processes would begin to read.
        yield from self._loader

    @property
    def _iterator(self) -> Any:
        """The loader processes, which Lightning ends and forgets, as a `DataLoader`'s."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        self._loader._iterator = value


def _shuffled(rows: Iterator[T], random: Random) -> Iterator[T]:
    """The rows, each in the place of one drawn from a buffer of those that come next."""
    buffer = list(islice(rows, _BUFFER))
    for row in rows:
        place = random.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = row
    random.shuffle(buffer)
    yield from buffer
