"""Whole models as destinations: what of them is exchanged, and what must be as the original has it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer
from transformers.utils.hub import cached_file

from .exchange import Exchange, Original
from .loading import load_model, quantization_of
from .processors import load_processor
from .structure import Structure

# Of the settings for pictures: what a processor is called, and not what it does.
_NAMES = {"image_processor_type", "processor_class", "auto_map", "feature_extractor_type", "device", "return_tensors"}
_PICTURES = ("preprocessor_config.json", "processor_config.json")
_TEXTS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def whole_model(path: str, model: Any, processor: Any, original: Original, growing: set[str]) -> Exchange:
    """What a fine-tuned model has otherwise than its original: weights, settings, how it generates.

    Args:
        path: Folder or hub id.
        model: The original.
        processor: Its processor: both are given the same pictures and the same prompts.
        original: Where its modules and tensors are.
        growing: Names of its tensors that may have more rows.

    Raises:
        ValueError: It cannot be loaded, is of another structure, reads pictures or words otherwise, or the original is
            quantised.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            "it is a whole model, and of it no weights can be put into an original that is "
            "quantised; give an adapter, or an original in full precision"
        )
    if not original.is_whole:
        raise ValueError(
            "it is a whole model, and of the original a part lies in main memory or on disk, where "
            "nothing can be exchanged; give an adapter, or leave --model.init_args.device_map out"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    other = load_model(path, dtype=dtype, attention=model.config._attn_implementation)
    if (method := quantization_of(other)) is not None:
        raise ValueError(
            f"it is a whole model whose weights are quantised ({method}), and the original's "
            "are not; give one in full precision, or an adapter"
        )
    if other.generation_config.pad_token_id is None:
        other.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    _check_image_token(model, other)
    _check_processor(path, processor)
    return original.compare(other, growing)


def grown_tokenizer(path: str, tokenizer: Any) -> Any:
    """The tokenizer of a destination with more tokens than the original; nothing where it has none.

    Args:
        path: Folder or hub id.
        tokenizer: The original's.

    Raises:
        ValueError: It has another token in the place of one of the original's.
    """
    if not _has(path, _TEXTS):
        return None
    found = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    theirs = found.get_vocab()
    for token, number in tokenizer.get_vocab().items():
        if theirs.get(token) != number:
            raise ValueError(
                f"its token {token!r} has the number {theirs.get(token)}, the original's {number}: they read "
                "prompts as different words"
            )
    return found


def _check_image_token(model: Any, other: Any) -> None:
    key = Structure(model).image_token_key
    own, theirs = ((getattr(one.config, key, None) if key else None) for one in (model, other))
    if own != theirs:
        raise ValueError(f"its {key} is {theirs}, the original's {own}")


def _check_processor(path: str, processor: Any) -> None:
    """Refuse what reads pictures or words otherwise; without files of its own it reads them as the original does.

    Raises:
        ValueError: It does; names the setting and both values.
    """
    if _has(path, _TEXTS):
        grown_tokenizer(path, processor.tokenizer)
    if not _has(path, _PICTURES):
        return
    theirs = load_processor(path)
    own_pictures, pictures = (_settings(getattr(one, "image_processor", None)) for one in (processor, theirs))
    for key in sorted(own_pictures.keys() & pictures.keys()):
        if own_pictures[key] != pictures[key]:
            raise ValueError(
                f"it reads pictures with {key} {pictures[key]}, the original with {own_pictures[key]}, and both are "
                f"given the same; without its {' and '.join(_PICTURES)} it reads them as the original does"
            )
    if None not in (theirs.chat_template, processor.chat_template) and theirs.chat_template != processor.chat_template:
        warnings.warn(
            f"destination {path!r} has another chat template than the original; both are asked in the original's",
            stacklevel=6,
        )


def _settings(pictures: Any) -> Mapping[str, Any]:
    found = {} if pictures is None else pictures.to_dict()
    return {key: value for key, value in found.items() if key not in _NAMES and value is not None}


def _has(path: str, files: tuple[str, ...]) -> bool:
    return any(cached_file(path, name, _raise_exceptions_for_missing_entries=False) for name in files)
