"""Which model or adapter a folder holds: hashes of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import get_session, is_offline_mode, try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import HFValidationError

from ...records.hashes import file_hashes, files_hash, value_hash
from ...records.paths import located

BASE_NOTE = "base_model.json"
"""Beside an adapter or model: which one it was trained from, and by what."""
OF_FILES, OF_TENSORS = "files", "tensors"
"""What a hash of weights begins with: what it was taken over."""

# In the order in which transformers looks for them.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_CONFIG = "adapter_config.json"
# What decides beside the weights what a model does with a picture and a prompt.
_SETTINGS = (
    "config.json", "generation_config.json", "*processor_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "chat_template.*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "*.py",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
# What an adapter's configuration says of where it came from, and not of what it does.
_NOT_THE_ADAPTER = {"base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping"}


def local_folder(source: str, revision: str | None, file: str = "config.json") -> Path | None:
    """The folder that a model or adapter is in; of the hub, where it has been downloaded to, if it has been.

    Args:
        source: Folder or hub id.
        revision: Commit or tag on the hub.
        file: A file that it has.
    """
    if (folder := _folder(source)) is not None:
        return folder
    try:
        found = try_to_load_from_cache(source, file, revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def check_reachable(name: str) -> None:
    """Ask the hub once whether it is there, before libraries ask for each of many files again and again.

    Args:
        name: Folder or hub id; nothing is asked for what is here.

    Raises:
        ValueError: It is not here, and the hub does not answer.
    """
    if is_offline_mode() or any(local_folder(name, None, file) for file in ("config.json", ADAPTER_CONFIG)):
        return
    try:
        get_session().head(f"{ENDPOINT}/{name}", timeout=HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # the client's own, of a package that the hub's exchanges
        raise ValueError(
            f"{name!r} is no folder here and was never downloaded, and {ENDPOINT} does not answer ({error})"
        ) from error


def model_hashes(source: str, revision: str | None) -> dict[str, str]:
    """What a model is, by the content of its files.

    Args:
        source: Folder or hub id.
        revision: Commit or tag on the hub.

    Returns:
        `weights_hash` of all its weights, and `settings_hash` of its configuration, processor and chat template;
        `base_weights_hash` where it says from which it was fine-tuned; of the hub also its `commit`. Nothing where
        there are no such files here.
    """
    folder = local_folder(source, revision)
    weights = None if folder is None else _weights(folder)
    if folder is None or not weights:
        return {}
    weights_hash = f"{OF_FILES}:{files_hash(weights)}"
    if _folder(source) is not None:
        hashes = {"weights_hash": weights_hash, "settings_hash": files_hash(_settings(folder))}
        base = base_note(folder).get("weights_hash")
        return hashes if base is None else {**hashes, "base_weights_hash": base}
    # Not all files need have been downloaded; the commit stands for them.
    return {"weights_hash": weights_hash, "settings_hash": value_hash(folder.name), "commit": folder.name}


def base_note(folder: Path) -> dict[str, Any]:
    """What an adapter or model that was exported says of the model that it was trained from, and of its training."""
    path = folder / BASE_NOTE
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def adapter_hash(source: str) -> str | None:
    """What a PEFT adapter is: a hash of its weights and of what its configuration says; nothing where it is not here.

    Args:
        source: Folder or hub id.
    """
    folder = local_folder(source, None, ADAPTER_CONFIG)
    if folder is None or not (folder / ADAPTER_CONFIG).is_file():
        return None
    weights = [path for name in _ADAPTER_WEIGHTS if (path := folder / name).is_file()][:1]
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return value_hash([file_hashes(weights), adapter_settings(config)])


def adapter_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Those options of a PEFT configuration that decide what the adapter does."""
    kept = {name: value for name, value in config.items() if name not in _NOT_THE_ADAPTER}
    # PEFT keeps names of modules in sets, and writes them in any order.
    return {name: sorted(map(str, value)) if isinstance(value, list | set) else value for name, value in kept.items()}


def destination_hash(source: str) -> str | None:
    """What a destination is, adapter or whole model: a hash of its files; nothing where these are not here."""
    found = adapter_hash(source)
    if found is not None:
        return found
    return model_destination_hash(model_hashes(source, None))


def model_destination_hash(hashes: Mapping[str, str]) -> str | None:
    """The hash that a whole model has as a destination.

    Args:
        hashes: What it is, see `model_hashes`.
    """
    known = [hashes.get(name) for name in ("weights_hash", "settings_hash")]
    return None if None in known else value_hash(known)


def _folder(source: str) -> Path | None:
    try:
        folder = Path(located(source, "model"))
    except ValueError:
        return None
    return folder if folder.is_dir() else None


def _weights(folder: Path) -> dict[str, Path]:
    """Name → file of the weights that transformers reads in a folder."""
    name = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        return {}
    if not name.endswith(".index.json"):
        return {name: folder / name}
    shards = set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values())
    return {name: folder / name, **{shard: folder / shard for shard in sorted(shards)}}


def _settings(folder: Path) -> dict[str, Path]:
    """Name → file of what else decides."""
    files = {
        path.name: path
        for path in folder.iterdir()
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _SETTINGS)
    }
    files |= {f"{_TEMPLATES}/{path.name}": path for path in (folder / _TEMPLATES).glob("*") if path.is_file()}
    return files
