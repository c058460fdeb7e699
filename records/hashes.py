"""What files and values hold, as SHA-256: two that have the same hash are the same, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .paths import user_path

CACHE = "~/.cache/conceptshift"
"""Folder of what can be found again at any time."""

# A file that is this young may be written again without its time changing: seconds.
_SETTLED = 2.0
_THREADS = min(8, os.cpu_count() or 1)
_TABLE = "CREATE TABLE IF NOT EXISTS hashes (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, sha256 TEXT NOT NULL)"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, see `file_hashes`."""
    return file_hashes([path])[0]


def file_hashes(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file's content.

    Files that have been read once are not read again as long as their path, size, times and inode are the same: these
    are kept in `~/.cache/conceptshift/hashes.sqlite`, since 14 GB of weights take half a minute.

    Args:
        paths: The files.

    Raises:
        OSError: One cannot be read.
    """
    resolved = [str(path.resolve()) for path in paths]
    stamps = {path: _stamp(path) for path in dict.fromkeys(resolved)}
    found = _known(stamps)
    missing = [path for path in stamps if path not in found]
    if missing:
        # Nothing to be seen of it where it is done in a moment.
        progress = tqdm(total=len(missing), desc="hashes of files", leave=False, delay=3)
        with progress, ThreadPoolExecutor(_THREADS) as threads:
            for path, sha256 in zip(missing, threads.map(_sha256, missing), strict=True):
                found[path] = sha256
                progress.update()
        settled = time.time_ns() - int(_SETTLED * 1e9)
        _keep({path: (stamps[path], found[path]) for path in missing if _changed(stamps[path]) < settled})
    return [found[path] for path in resolved]


def files_hash(files: Mapping[str, Path]) -> str:
    """SHA-256 over the names and contents of several files.

    Raises:
        OSError: One cannot be read.
    """
    names = sorted(files)
    return value_hash(dict(zip(names, file_hashes([files[name] for name in names]), strict=True)))


def value_hash(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def joined_hash(parts: Iterable[str]) -> str:
    """SHA-256 over texts in their order."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode()
        # With its length, so that where one ends and the next begins counts.
        digest.update(len(content).to_bytes(8) + content)
    return digest.hexdigest()


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: str) -> str:
    """What changes where a file's content does. The time of its last change of any kind cannot be set back."""
    found = os.stat(path)
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def _changed(stamp: str) -> int:
    """When a file was changed last, in nanoseconds."""
    _, modified, changed, _ = map(int, stamp.split())
    return max(modified, changed)


def _known(stamps: Mapping[str, str]) -> dict[str, str]:
    """Path → hash of the files that are as they were when they were read."""
    known: dict[str, str] = {}
    try:
        with closing(_database()) as database:
            for path, stamp in stamps.items():
                row = database.execute(
                    "SELECT sha256 FROM hashes WHERE path = ? AND stamp = ?", (path, stamp)
                ).fetchone()
                if row is not None:
                    known[path] = str(row[0])
    except (sqlite3.Error, OSError):
        return {}  # without the cache, files are read again
    return known


def _keep(rows: Mapping[str, tuple[str, str]]) -> None:
    try:
        with closing(_database()) as database, database:
            database.executemany(
                "INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", [(path, *row) for path, row in rows.items()]
            )
    except (sqlite3.Error, OSError):
        return  # a home folder that cannot be written: files are read again


def _database() -> sqlite3.Connection:
    folder = user_path(CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(folder / "hashes.sqlite", timeout=10)
    database.execute(_TABLE)
    return database
