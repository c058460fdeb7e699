"""What of a result is measured, without what differs whenever it is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_OF_THE_RUN = {"provenance", "dictionary_hash", "dictionary_hashes", "command", "date"}


def measured(found: Path | Any) -> Any:
    """A JSON file or value without what made it, and without hashes of what is only the same to rounding."""
    if isinstance(found, Path):
        return measured(json.loads(found.read_text()))
    if isinstance(found, dict):
        return {key: measured(value) for key, value in found.items() if key not in _OF_THE_RUN}
    return [measured(value) for value in found] if isinstance(found, list) else found
