"""Writes files and folders that are complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name beside it, and rename it when it is complete.

    Args:
        path: The file; its folder is made.
        write: Writes the content to the path it is given.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    working = path.with_name(f".{path.name}.part")
    try:
        write(working)
        os.replace(working, path)
    except Exception as error:
        # safetensors reports a full disk as an error of its own.
        if isinstance(error, OSError) or "os error" in str(error).lower():
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"{path}: cannot be written ({reason}); free some space or choose another folder") from error
        raise
    finally:
        working.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, complete or not at all."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    write_whole(path, lambda working: working.write_text(text, encoding="utf-8"))


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a hidden folder, which takes another's place when the block ends, and is removed where it fails.

    Whenever the process is killed, the folder is the old one or the new one, whole, or for a moment missing. What then
    lies about, `.<name>.part` and `.<name>.replaced`, the next call removes.

    Args:
        folder: The one to replace, which need not be there. Where it is a link, what it leads to is replaced.
    """
    folder = folder.resolve()
    working, aside = (folder.with_name(f".{folder.name}.{ending}") for ending in ("part", "replaced"))
    for left in (working, aside):
        shutil.rmtree(left, ignore_errors=True)
    working.mkdir(parents=True)
    try:
        yield working
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    put_in_place(working, folder)


def put_in_place(working: Path, folder: Path) -> None:
    """Let a folder take the place of another, which need not be there."""
    aside = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    working.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def beside(folder: Path) -> Path:
    """Where what is to take a folder's place is made, if that takes long: what is there stays until it is whole."""
    return folder.with_name(f".{folder.name}.new")
