"""A metric state for rows of text: torchmetrics synchronises tensors only, so rows travel as bytes."""

import json
import reprlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from .bootstrap import Measure

Record = dict[str, Any]


def encode_rows(records: Sequence[Record]) -> Tensor:
    r"""Return the records as bytes of JSON, one line each.

    Args:
        records: Rows of JSON values.

    Returns:
        uint8 [number of bytes], on the CPU. Ends with a line break, so encoded rows can be concatenated.
    """
    # ASCII escapes also carry lone surrogates, which UTF-8 would refuse.
    lines = "".join(json.dumps(record) + "\n" for record in records)
    return torch.tensor(list(lines.encode("ascii")), dtype=torch.uint8)


def decode_rows(encoded: Tensor) -> list[Record]:
    """Return the records of `encode_rows`, in the order of the bytes.

    Args:
        encoded: uint8 [number of bytes], on any device.

    Returns:
        The records; JSON has made lists of tuples.
    """
    return [json.loads(line) for line in bytes(encoded.cpu().numpy()).decode("ascii").splitlines()]


def unique_rows(records: Sequence[Record]) -> dict[str, Record]:
    """Key the records by their id, each id once: samplers repeat samples to fill the last batch.

    Args:
        records: Rows with an "id".

    Returns:
        id → record without its id, sorted by id, so that nothing downstream depends on the order of arrival.

    Raises:
        ValueError: If an id occurs with two different contents.
    """
    rows: dict[str, Record] = {}
    for record in records:
        content = {name: value for name, value in record.items() if name != "id"}
        known = rows.setdefault(record["id"], content)
        if known != content:
            name = next(name for name in content if known.get(name) != content[name])
            raise ValueError(
                f"sample id {record['id']!r} came with two different `{name}`, {reprlib.repr(known[name])} and "
                f"{reprlib.repr(content[name])}: give every sample its own id, and reset the metric between runs"
            )
    return dict(sorted(rows.items()))


class RowMetric(Metric):
    """Base of the metrics that score a whole set at once.

    Attributes:
        rows: id → record of every sample of every process, filled by `compute`, empty before and after `reset`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    encoded_rows: list[Tensor] | Tensor
    rows: Mapping[str, Record]

    def __init__(self, **kwargs: Any) -> None:
        """Start without rows.

        Args:
            **kwargs: Options of `torchmetrics.Metric`.
        """
        super().__init__(**kwargs)
        self.add_state("encoded_rows", default=[], dist_reduce_fx="cat")
        self.rows = {}

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Synchronise over processes; see `torchmetrics.Metric.sync`."""
        # A process that saw no batch would take part in the gather with floats, the others with bytes.
        if isinstance(self.encoded_rows, list) and not self.encoded_rows:
            self.encoded_rows.append(torch.zeros(0, dtype=torch.uint8, device=self.device))
        super().sync(*args, **kwargs)

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self.rows = {}

    def _add(self, sample_ids: Sequence[str], **columns: Sequence[Any]) -> None:
        """Add a batch given as columns of equal length."""
        for name, column in columns.items():
            if len(column) != len(sample_ids):
                raise ValueError(
                    f"`{name}` must have one entry per sample id ({len(sample_ids)}), got {len(column)}: "
                    "pass the columns of one batch together"
                )
        records = [
            {"id": sample_id} | {name: column[i] for name, column in columns.items()}
            for i, sample_id in enumerate(sample_ids)
        ]
        if records:
            assert isinstance(self.encoded_rows, list)
            self.encoded_rows.append(encode_rows(records).to(self.device))

    @abstractmethod
    def measures(self, rows: Mapping[str, Record]) -> dict[str, Measure]:
        """Return the scores of a set of rows, whatever came in."""

    def compute(self) -> dict[str, Tensor]:
        """Score everything that came in.

        Returns:
            Name → score, a float32 scalar.

        Raises:
            ValueError: If nothing came in, an id came with two contents, or as `measures`.
        """
        self.rows = self._merged()
        return {name: torch.tensor(measure.value) for name, measure in self.measures(self.rows).items()}

    def gathered(self) -> dict[str, Record]:
        """Return the rows of all processes without scoring them; every process must call it.

        Raises:
            ValueError: If nothing came in, or an id came with two contents.
        """
        with self.sync_context():
            return self._merged()

    def _merged(self) -> dict[str, Record]:
        """Return the rows of the processes whose states were synchronised."""
        encoded = dim_zero_cat(self.encoded_rows) if len(self.encoded_rows) else torch.zeros(0, dtype=torch.uint8)
        rows = unique_rows(decode_rows(encoded))
        if not rows:
            raise ValueError(f"{type(self).__name__} has no rows: call `update` with at least one sample first")
        return rows
