"""Reads annotation files: JSON with the keys one needs, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..records.paths import user_path


def data_folder(path: str | Path) -> Path:
    """Check that a data folder exists.

    Raises:
        FileNotFoundError: It does not.
    """
    folder = user_path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such data folder; set --data.init_args.root, or make one with "
            f"`conceptshift shapes --out {folder} --images 1000`"
        )
    return folder


def read_annotations(path: Path, *keys: str) -> Any:
    """Read a JSON object that has `keys` at its top level.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is no JSON, or lacks a key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file; is --data.init_args.root right?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: malformed JSON ({error}); download or generate it again") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path}: expected the key {missing[0]!r} at the top level; is this the right file?")
    return content
