"""Hashes of files and values: all of a content counts, and nothing else; what was read once is not read again."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from conceptshift.records import hashes
from conceptshift.records.hashes import file_hash, file_hashes, files_hash, joined_hash, value_hash


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of its own, so that the cache is empty."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def settled(path: Path, content: bytes) -> Path:
    """A file, written some time ago."""
    path.write_bytes(content)
    before = time.time() - 60
    os.utime(path, (before, before))
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, in any order."""
    seen: list[str] = []
    plain = hashes._sha256

    def counted(path: str) -> str:
        seen.append(Path(path).name)
        return plain(path)

    monkeypatch.setattr(hashes, "_sha256", counted)
    # The time of a file's last change of any kind is now, whatever its date says.
    monkeypatch.setattr(hashes, "_SETTLED", -1.0)
    return seen


def test_it_is_the_sha256_of_the_content(tmp_path: Path) -> None:
    paths = [settled(tmp_path / str(size), os.urandom(size)) for size in (0, 1, 3_000_000)]
    assert file_hashes(paths) == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert file_hashes([paths[1], paths[1]]) == [file_hash(paths[1])] * 2


def test_a_file_is_read_once(tmp_path: Path, read: list[str]) -> None:
    first, second = (settled(tmp_path / name, name.encode()) for name in ("one", "two"))
    found = file_hashes([first, second])
    assert file_hashes([second, first]) == found[::-1]
    assert sorted(read) == ["one", "two"]


@pytest.mark.parametrize("how", ["content", "date kept", "exchanged"])
def test_what_has_changed_is_read_again(tmp_path: Path, read: list[str], how: str) -> None:
    """Also where size and date are the old ones, as after `cp -p`."""
    path = settled(tmp_path / "one", b"aaaa")
    before, stat = file_hash(path), path.stat()
    if how == "exchanged":
        path.unlink()
    path.write_bytes(b"bbbb")
    if how != "content":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_hash(path) == hashlib.sha256(b"bbbb").hexdigest() != before
    assert read == ["one", "one"]


def test_a_file_that_may_still_be_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "young"
    path.write_bytes(b"a")
    stat = path.stat()
    # A clock so coarse that nothing of it changes.
    monkeypatch.setattr(hashes, "_stamp", lambda path: f"1 {stat.st_mtime_ns} {stat.st_ctime_ns} 1")
    assert file_hash(path) == hashlib.sha256(b"a").hexdigest()
    path.write_bytes(b"b")
    assert file_hash(path) == hashlib.sha256(b"b").hexdigest()


@pytest.mark.parametrize("spoiled", ["no database", "no folder"])
def test_without_a_cache_it_is_only_slower(tmp_path: Path, home: Path, read: list[str], spoiled: str) -> None:
    cache = home / ".cache" / "conceptshift"
    if spoiled == "no folder":
        (home / ".cache").write_text("a file")
    else:
        cache.mkdir(parents=True)
        (cache / "hashes.sqlite").write_bytes(b"no database at all, but long enough to be looked at" * 100)
    path = settled(tmp_path / "one", b"one")
    assert [file_hash(path), file_hash(path)] == [hashlib.sha256(b"one").hexdigest()] * 2
    assert read == ["one", "one"]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file_hash(tmp_path / "nothing")


def test_names_and_contents_count_and_the_order_does_not(tmp_path: Path) -> None:
    one, two = (settled(tmp_path / name, name.encode()) for name in ("one", "two"))
    both = files_hash({"a": one, "b": two})
    assert files_hash({"b": two, "a": one}) == both
    assert len({both, files_hash({"a": two, "b": one}), files_hash({"a": one, "c": two}), files_hash({"a": one})}) == 4
    assert value_hash({"a": [1, None], "b": "ü"}) == value_hash({"b": "ü", "a": [1, None]})
    assert len({value_hash(value) for value in (1, "1", [1], {"1": 1}, None, True)}) == 6
    assert len({joined_hash(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"])}) == 4
