"""Paths as users give them: one rule for what is read and what is written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_path(given: str | os.PathLike[str]) -> Path:
    """A path as it was given; `~` is the home folder, and what is relative starts from the working directory."""
    return Path(given).expanduser()


def user_name(given: str) -> str:
    """What may be a path or something else, such as a name on the hub; `~/` is the home folder."""
    return os.path.expanduser(given) if given == "~" or given.startswith("~/") else given


def user_flag(given: str) -> str:
    """A word of a command line; in `--out=~/results` the shell leaves `~` as it is."""
    name, equals, value = given.partition("=")
    return f"{name}={user_name(value)}" if equals and name.startswith("--") else given


def check_writable(path: Path, option: str, folder: bool = True) -> None:
    """Make sure, before a run begins, that a file or folder can be written at its end; nothing is left behind.

    Args:
        path: Where something will be written; it need not be there, nor the folders that lead to it.
        option: What named it, for the message.
        folder: Whether it is a folder, and not a file.

    Raises:
        ValueError: It cannot be written.
    """
    there = path if folder else path.parent
    while not (there.exists() or there.is_symlink()) and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        where = "" if there == path else f"{there}: "
        raise ValueError(
            f"{option}: {path} cannot be written ({where}{error.strerror}); choose another folder"
        ) from error
