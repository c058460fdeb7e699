"""The feature store: bounded shards, complete or absent, merged by sample id."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conceptshift.datamodules import stored_features
from conceptshift.datamodules.stored_features import (
    FeatureShardWriter,
    FeatureStore,
    begin_store,
    merge_store,
    written_ids,
)
from conceptshift.records import files
from safetensors import safe_open

METADATA: dict[str, Any] = {
    "model_id": "m", "sites": ["s", "t"], "selectors": ["answer", "image"], "variants": ["original"], "hash": "1",
}  # fmt: skip
RUN = {key: METADATA[key] for key in ("model_id", "selectors")}


def add(writer: FeatureShardWriter, ids: Sequence[int]) -> None:
    """Sample n has n % 4 states of `answer` and one of `image`; every state says which it is."""
    samples = [
        {"sample_id": f"{n:03d}", "variant": "original", "image": f"{n}.jpg", "prompt": "p", "text": f"t{n}",
         "references": [], "answers": ["x"]}
        for n in ids
    ]  # fmt: skip
    keys = [(n, "answer", position) for n in ids for position in range(n % 4)] + [(n, "image", 7) for n in ids]
    states = [
        {"sample_id": f"{n:03d}", "variant": "original", "selector": selector, "position": position, "token": "x"}
        for n, selector, position in keys
    ]
    s = torch.tensor([[n, position, 0.5] for n, _, position in keys])
    writer.add(samples, states, {"s": s, "t": -s[:, :2].bfloat16()})


def build(folder: Path, batches: Sequence[Sequence[int]], shard_rows: int = 10, ranks: int = 1) -> FeatureStore:
    begin_store(folder, METADATA, resumed=False, overwrite=False)
    writers = [FeatureShardWriter(folder, rank, shard_rows) for rank in range(ranks)]
    for number, batch in enumerate(batches):
        add(writers[number % ranks], batch)
    for writer in writers:
        writer.flush()
    merge_store(folder)
    return FeatureStore(folder)


def expected(ids: Sequence[int], selector: str) -> tuple[list[str], list[list[float]]]:
    rows = [(n, p) for n in sorted(ids) for p in (range(n % 4) if selector == "answer" else [7])]
    return [f"{n:03d}" for n, _ in rows], [[n, p, 0.5] for n, p in rows]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 40])
@pytest.mark.parametrize("shard_rows", [1, 10, 10_000])
def test_a_store_does_not_depend_on_order_batches_shards_or_processes(
    tmp_path: Path, ranks: int, batch_size: int, shard_rows: int
) -> None:
    ids = list(range(37))
    random.Random(ranks * batch_size).shuffle(ids)
    store = build(tmp_path, [ids[at : at + batch_size] for at in range(0, 37, batch_size)], shard_rows, ranks)
    for selector in ("answer", "image"):
        names, rows = expected(ids, selector)
        found, states = store.states("s", selector, "original")
        assert found == names
        assert torch.equal(states, torch.tensor(rows))
        found, states = store.states("t", selector, "original")
        assert (found, states.dtype) == (names, torch.float32)
        assert torch.equal(states, -torch.tensor(rows)[:, :2])
    samples = store.samples("original")
    assert list(samples) == [f"{n:03d}" for n in range(37)]
    assert samples["012"]["text"] == "t12"
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("shard_rows", [8, 16, 50])
def test_shards_are_bounded(tmp_path: Path, shard_rows: int) -> None:
    """No shard holds more states than asked for, unless a single batch does."""
    batches = [range(at, at + 3) for at in range(0, 60, 3)]  # up to 9 states each
    build(tmp_path, batches, shard_rows)
    sizes = []
    for path in sorted(tmp_path.glob("rank-*/*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            sizes.append(len(shard.get_tensor("s")))
    assert sum(sizes) == pq.read_table(tmp_path / "states.parquet").num_rows
    assert len(sizes) >= sum(sizes) // (shard_rows + 9)
    assert max(sizes) <= max(shard_rows, 9)


def test_samples_without_states_do_not_pile_up(tmp_path: Path) -> None:
    """A selector that rarely matches must not keep all samples in memory, or lose them in an interruption."""
    begin_store(tmp_path, METADATA, resumed=False, overwrite=False)
    writer = FeatureShardWriter(tmp_path, 0, shard_rows=10)
    for n in range(100):
        row = {"sample_id": f"{n}", "variant": "original", "image": "", "prompt": "", "text": "", "references": [],
               "answers": []}  # fmt: skip
        writer.add([row], [], {"s": torch.zeros(0, 3)})
    assert len(written_ids(tmp_path, RUN)) >= 80


def test_a_sample_written_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sample '005' \(original\) was written more than once"):
        build(tmp_path, [[1, 5], [5, 6]])
    with pytest.raises(ValueError, match="an unfinished feature store"):
        FeatureStore(tmp_path)


def test_nothing_extracted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sample was extracted"):
        build(tmp_path, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("u", "answer", "original"), "no site 'u'; the store has s, t"),
        (("s", "prompt", "original"), "no selector 'prompt'; the store has answer, image"),
        (("s", "answer", "destination"), "no variant 'destination'; the store has original"),
        (("s", "answer", "original"), "matched none of 2 original samples"),
    ],
)
def test_what_a_store_does_not_have(tmp_path: Path, arguments: tuple[str, str, str], message: str) -> None:
    store = build(tmp_path, [[0, 4]])
    with pytest.raises(ValueError, match=message):
        store.states(*arguments)


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no feature store"):
        FeatureStore(tmp_path / "nowhere")
    (tmp_path / "thesis.tex").write_text("keep me")
    with pytest.raises(ValueError, match="not empty and no feature store"):
        begin_store(tmp_path, METADATA, resumed=False, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "keep me"


def test_resuming_goes_on_behind_the_last_shard(tmp_path: Path) -> None:
    begin_store(tmp_path, METADATA, resumed=False, overwrite=False)
    writer = FeatureShardWriter(tmp_path, 0, shard_rows=5)
    for batch in ([0, 1], [2, 3], [4]):
        add(writer, batch)
    # [4] was held in memory when the run died; half a shard lies about.
    shards = len(list(tmp_path.glob("rank-00000/*.samples.parquet")))
    (tmp_path / "rank-00000" / f"{shards:06d}.safetensors").write_bytes(b"half")
    done = written_ids(tmp_path, RUN)
    assert done == {"000", "001", "002", "003"}
    begin_store(tmp_path, METADATA, resumed=True, overwrite=False)
    writer = FeatureShardWriter(tmp_path, 0, shard_rows=5)
    add(writer, [4, 5])
    writer.flush()
    merge_store(tmp_path)
    assert FeatureStore(tmp_path).states("s", "image", "original")[0] == [f"00{n}" for n in range(6)]
    # Finished: a new run of the same begins anew.
    assert written_ids(tmp_path, RUN) == set()


def test_only_exactly_the_same_run_is_resumed(tmp_path: Path) -> None:
    begin_store(tmp_path, METADATA, resumed=False, overwrite=False)
    add(writer := FeatureShardWriter(tmp_path, 0, 1), [1])
    writer.flush()
    assert written_ids(tmp_path, RUN) == {"001"}
    assert written_ids(tmp_path, {**RUN, "model_id": "other"}) == set()
    assert written_ids(tmp_path, {**RUN, "new_option": 1}) == set()
    with pytest.raises(ValueError, match=r"another run \(`hash` was \'1\', and is \'2\'\).*overwrite: true"):
        begin_store(tmp_path, {**METADATA, "hash": "2"}, resumed=True, overwrite=False)
    assert written_ids(tmp_path, RUN) == {"001"}


@pytest.mark.parametrize("finished", [True, False])
def test_another_runs_store_is_kept_unless_overwritten(tmp_path: Path, finished: bool) -> None:
    """Also an unfinished one: it may hold days of work, and a mistyped option must not delete it."""
    begin_store(tmp_path, METADATA, resumed=False, overwrite=False)
    add(writer := FeatureShardWriter(tmp_path, 0, 1), [1, 2])
    writer.flush()
    if finished:
        merge_store(tmp_path)
    other = {**METADATA, "model_id": "other"}
    with pytest.raises(ValueError, match=r"another run \(`model_id` was \'m\', and is \'other\'\).*overwrite: true"):
        begin_store(tmp_path, other, resumed=False, overwrite=False)
    assert list(tmp_path.glob("rank-*/*.safetensors"))
    begin_store(tmp_path, other, resumed=False, overwrite=True)
    assert not list(tmp_path.glob("rank-*"))


@pytest.mark.parametrize("moment", ["before the metadata", "while the old one is removed"])
def test_a_store_that_was_killed_while_it_was_replaced_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The folder is the old store or the new one; what else lies about is removed by the next run."""
    folder = tmp_path / "store"
    build(folder, [[1, 2]])
    remove = shutil.rmtree

    def killed(*arguments: Any, **options: Any) -> None:
        if moment == "before the metadata":
            raise SystemExit
        if Path(arguments[0]).exists():
            (Path(arguments[0]) / "metadata.json").unlink()
            raise SystemExit

    with monkeypatch.context() as patch:
        if moment == "before the metadata":
            patch.setattr(stored_features, "write_json", killed)
            # As nothing is cleaned up where a process is killed.
            patch.setattr(shutil, "rmtree", lambda path, **_: remove(path, **_) if "replaced" in Path(path).name else 0)
        else:
            patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            begin_store(folder, METADATA, resumed=False, overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} > {"store"}, "something lies about"
    assert json.loads((folder / "metadata.json").read_text()) == METADATA
    begin_store(folder, METADATA, resumed=False, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert [path.name for path in folder.iterdir()] == ["metadata.json"]


def test_a_store_behind_a_link_stays_there(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk", target_is_directory=True)
    for _ in range(2):
        build(tmp_path / "store", [[1, 2]])
    assert (tmp_path / "store").is_symlink()
    assert FeatureStore(tmp_path / "disk").samples("original").keys() == {"001", "002"}


def test_malformed_metadata(tmp_path: Path) -> None:
    build(tmp_path, [[1]])
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match=r"metadata\.json: malformed JSON"):
        FeatureStore(tmp_path)
    with pytest.raises(ValueError, match=r"metadata\.json: malformed JSON"):
        written_ids(tmp_path, RUN)


@pytest.mark.parametrize("failing", ["safetensors", "states.parquet", "samples.parquet", "os.replace", "metadata.json"])
def test_a_full_disk_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    folder = tmp_path / "store"
    begin_store(folder, METADATA, resumed=False, overwrite=False)
    add(writer := FeatureShardWriter(folder, 0, 1), [1, 2])
    if failing == "os.replace":
        monkeypatch.setattr("conceptshift.records.files.os.replace", _raising(full))
    else:
        write = files.write_whole

        def write_until_full(path: Path, content: Any) -> None:
            def half(working: Path) -> None:
                working.write_bytes(b"half")
                raise full

            write(path, half if path.name.endswith(failing) else content)

        monkeypatch.setattr("conceptshift.datamodules.stored_features.write_whole", write_until_full)
        monkeypatch.setattr("conceptshift.records.files.write_whole", write_until_full)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\); free some space") as caught:
        begin_store(tmp_path / "another", METADATA, False, False) if failing == "metadata.json" else add(writer, [3, 4])
    assert len(str(caught.value).splitlines()) == 1
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.part"))
    left = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: left[path] for path in before} == before
    assert written_ids(folder, RUN) == {"001", "002"}


def _raising(error: Exception) -> Any:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


def test_safetensors_own_errors_are_told_in_the_same_way(tmp_path: Path) -> None:
    """Safetensors raises no OSError where it cannot write."""
    begin_store(tmp_path, METADATA, resumed=False, overwrite=False)
    (tmp_path / "rank-00000").mkdir()
    (tmp_path / "rank-00000" / ".000000.safetensors.part").mkdir()
    writer = FeatureShardWriter(tmp_path, 0, 1)
    with pytest.raises(OSError, match=r"000000\.safetensors"):
        add(writer, [1])


def test_json_is_written_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.json"
    files.write_json(path, {"b": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"b": float("nan")})
    assert json.loads(path.read_text()) == {"b": 1}
    assert [other.name for other in path.parent.iterdir()] == ["x.json"]
