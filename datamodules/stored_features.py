"""The feature store: hidden states on disk, written per process, merged by sample id.

A store is a folder. While it is written, every process fills `rank-<r>/` with shards: `<n>.safetensors` (site → states
[rows, D]), `<n>.states.parquet` (one row a state) and `<n>.samples.parquet` (one row a sample and variant). A shard is
complete or absent, so an interrupted run goes on behind its last one. Merging writes `states.parquet` and
`samples.parquet`, sorted by sample id, which makes a store independent of the number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..records.files import replacing, write_json, write_whole
from ..records.paths import user_path
from ..records.provenance import mismatch

STATE_COLUMNS = pa.schema(
    [
        ("sample_id", pa.string()),
        ("variant", pa.string()),
        ("selector", pa.string()),
        ("position", pa.int32()),
        ("token", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int32()),
    ]
)
"""One row a state: which sample, `original` or `destination`, which selector, where, and what it predicts."""

SAMPLE_COLUMNS = pa.schema(
    [
        ("sample_id", pa.string()),
        ("variant", pa.string()),
        ("image", pa.string()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("references", pa.list_(pa.string())),
        ("answers", pa.list_(pa.string())),
        ("label", pa.string()),
        ("input", pa.string()),
    ]
)
"""One row a sample and variant: the picture, what was asked, what the model answered, and what the data say of it.

`input` is a hash of the prompt and of the picture's content.
"""

Row = dict[str, Any]
# States that are held at a time where a store is larger than memory.
_PIECE = 16_384


def _write_table(path: Path, table: pa.Table) -> None:
    write_whole(path, lambda working: pq.write_table(table, working))


class FeatureShardWriter:
    """Writes one process's part of a store; holds at most one shard in memory.

    Args:
        folder: The store.
        rank: This process.
        shard_rows: States per shard.
    """

    def __init__(self, folder: Path, rank: int, shard_rows: int) -> None:
        self.folder = folder
        self.rank_folder = folder / f"rank-{rank:05d}"
        self.shard_rows = shard_rows
        self._samples: list[Row] = []
        self._states: list[Row] = []
        self._tensors: dict[str, list[Tensor]] = {}
        self._shards = len(list(self.rank_folder.glob("*.samples.parquet")))

    def add(self, samples: Sequence[Row], states: Sequence[Row], tensors: Mapping[str, Tensor]) -> None:
        """Add whole samples.

        Args:
            samples: Rows of `SAMPLE_COLUMNS`.
            states: N rows of `STATE_COLUMNS` without `shard` and `row`.
            tensors: Site → states [N, D].
        """
        if self._states and len(self._states) + len(states) > self.shard_rows:
            self.flush()
        self._samples += samples
        self._states += states
        for site, tensor in tensors.items():
            self._tensors.setdefault(site, []).append(tensor.cpu())
        if max(len(self._states), len(self._samples)) >= self.shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write what is held as one shard."""
        if not self._samples:
            return
        name = f"{self._shards:06d}"
        shard = f"{self.rank_folder.name}/{name}.safetensors"
        for row, state in enumerate(self._states):
            state.update(shard=shard, row=row)
        tensors = {site: torch.cat(parts).contiguous() for site, parts in self._tensors.items()}
        write_whole(self.folder / shard, lambda working: save_file(tensors, working))
        # `samples` comes last: a shard counts from the moment its samples are listed.
        _write_table(self.rank_folder / f"{name}.states.parquet", pa.Table.from_pylist(self._states, STATE_COLUMNS))
        _write_table(self.rank_folder / f"{name}.samples.parquet", pa.Table.from_pylist(self._samples, SAMPLE_COLUMNS))
        self._shards += 1
        self._samples, self._states, self._tensors = [], [], {}


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a store that was written to its end."""
    return (folder / "states.parquet").is_file()


def reusable(folder: Path, run: Row, overwrite: bool) -> bool:
    """Whether a folder holds a finished store of exactly this run.

    Args:
        folder: The store.
        run: What makes the states what they are, as far as it is known.
        overwrite: A store of another run may be replaced.

    Raises:
        ValueError: It holds a finished store of another run, which is not to be replaced.
    """
    found = _read_json(folder / "metadata.json")
    if found is None or not is_finished(folder):
        return False
    odd = mismatch(found, run)
    # What left something out gives way to what does not.
    if odd is not None and not overwrite and not (found.get("limits") and not run.get("limits")):
        raise ValueError(_another_run(folder, odd))
    return odd is None


def _another_run(folder: Path, odd: str) -> str:
    return (
        f"{folder}: holds the features of another run ({odd}); choose another folder (--out), or set "
        "`overwrite: true` for FeatureWriter"
    )


def written_ids(folder: Path, run: Row) -> set[str]:
    """Ids of the samples that an interrupted run has already written.

    Args:
        folder: The store.
        run: What makes the states what they are, as far as it is known before the model is loaded.

    Returns:
        The ids; empty where the folder holds no unfinished store of exactly this run.
    """
    found = _read_json(folder / "metadata.json")
    if found is None or is_finished(folder) or mismatch(found, run) is not None:
        return set()
    ids: set[str] = set()
    for path in folder.glob("rank-*/*.samples.parquet"):
        ids.update(pq.read_table(path, columns=["sample_id"])["sample_id"].to_pylist())
    return ids


def drop_last_shard(folder: Path) -> set[str]:
    """Take back the newest shard of a store and return the ids of its samples."""
    newest = max(folder.glob("rank-*/*.samples.parquet"), key=lambda path: (path.name, path.parent.name))
    ids = set(pq.read_table(newest, columns=["sample_id"])["sample_id"].to_pylist())
    newest.unlink()
    return ids


def extend_store(folder: Path, variants: list[str]) -> None:
    """Let a store have these variants, and drop the shards of all others.

    Every shard must be of one variant.

    Args:
        folder: The store; merge it afterwards.
        variants: All that it shall have, in order.
    """
    for path in folder.glob("rank-*/*.samples.parquet"):
        found = set(pq.read_table(path, columns=["variant"])["variant"].to_pylist())
        if not found <= set(variants):
            # The list of samples first: without it a shard does not count.
            for kind in (".samples.parquet", ".states.parquet", ".safetensors"):
                path.with_name(path.name.replace(".samples.parquet", kind)).unlink()
    write_json(folder / "metadata.json", {**(_read_json(folder / "metadata.json") or {}), "variants": variants})


def begin_store(folder: Path, metadata: Row, resumed: bool, overwrite: bool) -> None:
    """Prepare a folder for writing. A finished store of the same run is written anew.

    Args:
        folder: The store.
        metadata: What makes the states what they are (model, adapter, sites, selectors, data).
        resumed: Keep the shards that are there.
        overwrite: Replace a store of another run.

    Raises:
        ValueError: The folder holds states of another run or of other weights, or other files.
    """
    found = _read_json(folder / "metadata.json")
    if found is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty and no feature store; choose another folder")
    keep = any(folder.glob("rank-*/*.samples.parquet"))
    odd = None if found is None else mismatch(found, metadata)
    if keep and not overwrite and odd is not None:
        raise ValueError(_another_run(folder, odd))
    if resumed and found is not None and odd is None:
        return
    with replacing(folder) as working:
        write_json(working / "metadata.json", metadata)


def _read_json(path: Path) -> Row | None:
    if not path.is_file():
        return None
    try:
        content: Row = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: malformed JSON ({error}); remove the folder and extract again") from error
    return content


def merge_store(folder: Path, skipped: Sequence[Mapping[str, str]] = ()) -> None:
    """Join the shards' indices; afterwards the store is finished.

    Args:
        folder: The store.
        skipped: Samples left out (`sample_id`, `reason`), listed in `skipped.json`.

    Raises:
        ValueError: A sample was written twice, or there are no samples.
    """
    parts = sorted(folder.glob("rank-*/*.samples.parquet"))
    if not parts:
        raise ValueError(f"{folder}: no sample was extracted; is every picture unreadable?")
    # A resumed store may have shards from before a column was added.
    samples = pa.concat_tables([pq.read_table(path) for path in parts], promote_options="default")
    keys = list(zip(samples["sample_id"].to_pylist(), samples["variant"].to_pylist(), strict=True))
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(
            f"{folder}: sample {twice[0]!r} ({twice[1]}) was written more than once; are sample ids unique?"
        )
    states = pa.concat_tables([pq.read_table(Path(str(path).replace(".samples.", ".states."))) for path in parts])
    order = [("sample_id", "ascending"), ("variant", "ascending")]
    write_json(folder / "skipped.json", sorted(skipped, key=lambda row: row["sample_id"]))
    _write_table(folder / "samples.parquet", samples.sort_by(order))
    by_position = [*order, ("selector", "ascending"), ("position", "ascending")]
    _write_table(folder / "states.parquet", states.sort_by(by_position))


class FeatureStore:
    """A finished store, for reading.

    Args:
        folder: The store.

    Raises:
        ValueError: The folder holds no finished store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = user_path(folder)
        if not (self.folder / "states.parquet").is_file():
            state = "an unfinished feature store" if (self.folder / "metadata.json").is_file() else "no feature store"
            raise ValueError(f"{self.folder}: {state}; run `conceptshift predict` with a FeatureWriter to the end")
        self.metadata = _read_json(self.folder / "metadata.json") or {}
        self._index = pq.read_table(self.folder / "states.parquet")

    def samples(self, variant: str) -> dict[str, Row]:
        """Sample id → row of `SAMPLE_COLUMNS`, in order of id; without a label it is empty, as in stores of old."""
        table = pq.read_table(self.folder / "samples.parquet", filters=[("variant", "=", variant)])
        return {row["sample_id"]: {**row, "label": row.get("label") or ""} for row in table.to_pylist()}

    def states(self, site: str, selector: str, variant: str) -> tuple[list[str], Tensor]:
        """Read the states of one site.

        Args:
            site: Site they were read at.
            selector: Selector that chose them.
            variant: `original` or `destination`.

        Returns:
            Sample ids [N] and float32 states [N, D], in order of id and position.

        Raises:
            ValueError: There are none.
        """
        ids, shards = self.shards(site, selector, variant)
        return ids, shards.load()

    def shards(self, site: str, selector: str, variant: str) -> tuple[list[str], StateShards]:
        """The same as `states`, to be read piece by piece.

        Raises:
            ValueError: There are none.
        """
        for name, value, known in (
            ("site", site, self.metadata.get("sites", [])),
            ("selector", selector, self.metadata.get("selectors", [])),
            ("variant", variant, self.metadata.get("variants", [])),
        ):
            if value not in known:
                raise ValueError(f"{self.folder}: no {name} {value!r}; the store has {', '.join(known)}")
        rows = self._rows(selector, variant)
        if rows.num_rows == 0:
            count = len(self.samples(variant))
            raise ValueError(
                f"{self.folder}: selector {selector!r} matched none of {count} {variant} samples; does the word occur?"
            )
        places = list(zip(rows["shard"].to_pylist(), rows["row"].to_pylist(), strict=True))
        return rows["sample_id"].to_pylist(), StateShards(self, site, places)

    def tokens(self, selector: str, variant: str) -> list[str]:
        """The token that each state predicts [N], in the order of `states`."""
        tokens: list[str] = self._rows(selector, variant)["token"].to_pylist()
        return tokens

    def positions(self, selector: str, variant: str) -> list[int]:
        """Position of each state in its sample's sequence [N], in the order of `states`."""
        positions: list[int] = self._rows(selector, variant)["position"].to_pylist()
        return positions

    def shard_rows(self) -> dict[str, int]:
        """Shard → number of states that the index has of it, by name of the shard."""
        counts = self._index["shard"].value_counts().to_pylist()
        return {count["values"]: count["counts"] for count in sorted(counts, key=lambda count: count["values"])}

    def read_shard(self, shard: str) -> dict[str, Tensor]:
        """Site → states [rows, D] of one shard, as they are on disk.

        Raises:
            ValueError: The shard is missing or damaged.
        """
        with self.open_shard(shard) as file:
            return {site: file.get_tensor(site) for site in file.keys()}  # noqa: SIM118 - no dictionary

    def _rows(self, selector: str, variant: str) -> pa.Table:
        wanted = pc.and_(pc.equal(self._index["selector"], selector), pc.equal(self._index["variant"], variant))
        return self._index.filter(wanted)

    def open_shard(self, shard: str) -> Any:
        """One shard, open for reading.

        Raises:
            ValueError: It is missing or damaged.
        """
        try:
            return safe_open(self.folder / shard, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.folder / shard}: missing or damaged ({error}); extract again") from error


class StateShards:
    """States [N, D] of a store, read piece by piece as often as they are gone through; one piece is held at a time.

    Args:
        store: The store.
        site: Site of the states.
        places: Shard and row of each state [N].
    """

    def __init__(self, store: FeatureStore, site: str, places: Sequence[tuple[str, int]]) -> None:
        self.store = store
        self.site = site
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Tensor]:
        """Pieces [n, D], float32, in order."""
        for start in range(0, len(self.places), _PIECE):
            yield self._read(self.places[start : start + _PIECE])

    def take(self, rows: Sequence[int]) -> StateShards:
        """Some of the states, by their number."""
        return StateShards(self.store, self.site, [self.places[row] for row in rows])

    def load(self) -> Tensor:
        """All of them [N, D]."""
        pieces = list(self)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _read(self, places: Sequence[tuple[str, int]]) -> Tensor:
        by_shard: dict[str, list[int]] = {}
        for number, (shard, _) in enumerate(places):
            by_shard.setdefault(shard, []).append(number)
        out: Tensor | None = None
        for shard, numbers in by_shard.items():
            with self.store.open_shard(shard) as file:
                # Mapped, not read: only the pages of these rows are.
                states = file.get_tensor(self.site)[[places[number][1] for number in numbers]].float()
            out = torch.empty(len(places), states.shape[1]) if out is None else out
            out[numbers] = states
        assert out is not None
        return out


def held_out_ids(ids: Iterable[str], share: float) -> set[str]:
    """Choose samples by a hash of their id: the same ones whatever their order and whatever others there are.

    Args:
        ids: Sample ids.
        share: Probability of each to be chosen.

    Raises:
        ValueError: `share` is not in 0 … 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"held_out must be at least 0 and below 1, got {share}")
    return {sample_id for sample_id in ids if _uniform(sample_id) < share}


def _uniform(sample_id: str) -> float:
    """A number in 0 … 1 that only the id decides."""
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8]) / 2**64
