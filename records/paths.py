"""Paths as users give them: one rule for what is read and what is written."""

from __future__ import annotations

import os
import re
import tempfile
from difflib import get_close_matches
from pathlib import Path

_EMBEDDED = "embedded:"
_SHIPPED = Path(__file__).resolve().parents[1] / "checkpoints"
# Folders that configurations and the README name: never an owner on the hub, where anyone could be called so.
_FOLDERS = ("checkpoints", "data", "configs", "runs", "outputs")
_HUB_NAME = re.compile(r"[\w.-]+")


def user_path(given: str | os.PathLike[str]) -> Path:
    """A path as it was given; `~` is the home folder, and what is relative starts from the working directory."""
    return Path(user_name(os.fspath(given)))


def user_name(given: str) -> str:
    """What may be a path or something else, such as a name on the hub; `~/` is the home folder."""
    return os.path.expanduser(given) if given == "~" or given.startswith("~/") else given


def located(given: str, option: str, owned: bool = True) -> str:
    """Where a model, adapter or data set is that is named by its folder, by its id on the hub, or as one that is here.

    Args:
        given: Folder, `owner/name` on the hub, or `embedded:shapes-llava`, which is looked for nowhere else.
        option: What named it, for the message.
        owned: Whether a name on the hub must have an owner: models have, some data sets and text encoders have not.

    Returns:
        The folder, or the hub id.

    Raises:
        ValueError: Nothing is there, and it is no hub id; at once, whatever a hub would say.
    """
    if given.startswith(_EMBEDDED):
        shipped = sorted(folder.name for folder in _SHIPPED.iterdir() if folder.joinpath("config.json").is_file())
        if (name := given.removeprefix(_EMBEDDED)) not in shipped:
            there = ", ".join(_EMBEDDED + one for one in shipped)
            raise ValueError(f"{option} {given!r}: no such model comes along; there is {there}")
        return str(_SHIPPED / name)
    path = user_path(given)
    if given and path.is_dir():
        return str(path)
    if is_hub_id(given, owned):
        return given
    ways = f"a folder, owner/name on the hub, or {_EMBEDDED}shapes-llava" if owned else "a folder or its id on the hub"
    raise ValueError(f"{option} {given!r}: no such folder{_alike(path)}; give {ways}")


def is_hub_id(given: str, owned: bool = True) -> bool:
    """Whether a name can be one on the hub, and is none of a folder here or of one that configurations name.

    Args:
        given: The name.
        owned: Whether it must have an owner.
    """
    owner, slash, name = given.rpartition("/")
    if not (_HUB_NAME.fullmatch(name) and (not slash or _HUB_NAME.fullmatch(owner))):
        return False
    return not owned if not slash else owner not in (*_FOLDERS, ".", "..") and not Path(owner).exists()


def _alike(path: Path) -> str:
    """A folder that may have been meant."""
    if not path.parent.is_dir():
        return ""
    there = [one.name for one in path.parent.iterdir() if one.is_dir()]
    found = get_close_matches(path.name, there, 1)
    return f" (is {str(path.with_name(found[0]))!r} meant?)" if found else ""


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
