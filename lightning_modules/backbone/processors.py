"""Loads processors, for pictures alone where torchvision is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers import AutoProcessor
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.processing_utils import MODALITY_TO_AUTOPROCESSOR_MAPPING, ProcessorMixin
from transformers.utils import VIDEO_PROCESSOR_NAME
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available


def load_processor(model_id: str, **options: Any) -> Any:
    """Load the processor of a model.

    Args:
        model_id: Folder or hub id.
        options: As for `AutoProcessor.from_pretrained`.

    Raises:
        ValueError: It needs a package that is not installed.
    """
    with pictures_only():
        try:
            return AutoProcessor.from_pretrained(model_id, **options)
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"model_id {model_id!r}: its processor needs a package that is missing ({reason})"
            ) from error


@contextmanager
def pictures_only() -> Iterator[None]:
    """Within the context processors are made without their part for videos, if torchvision is missing.

    transformers has that part only on torchvision and refuses a processor without it; pictures do not need it.
    """
    if is_torchvision_available():
        yield
        return
    check: Any = ProcessorMixin.check_argument_for_proper_class

    def lenient(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else check(self, name, argument)

    with (
        patch.object(ProcessorMixin, "check_argument_for_proper_class", lenient),
        patch.dict(MODALITY_TO_AUTOPROCESSOR_MAPPING._MAPPING_NAMES, video_processor=(__name__, "VideoOptions")),
        _pixtral_without_torchvision(),
    ):
        yield


@contextmanager
def _pixtral_without_torchvision() -> Iterator[None]:
    """Pixtral's processor takes one function, which computes sizes, from the module that needs torchvision."""
    name = "transformers.models.pixtral.image_processing_pixtral"
    sys.modules[name] = image_processing_pil_pixtral
    try:
        yield
    finally:
        del sys.modules[name]


class VideoOptions(dict[str, Any]):
    """The options of a processor's part for videos, kept so that saving the processor loses nothing."""

    _auto_class = None
    font = ""  # ERNIE's processor looks for one to copy

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    @classmethod
    def from_pretrained(cls, model_id: str, **options: Any) -> VideoOptions:
        """Read the options from where transformers writes them, now or in older versions."""
        options.pop("trust_remote_code", None)
        together, _ = ProcessorMixin.get_processor_dict(model_id, **options)
        if "video_processor" in together:
            return cls(together["video_processor"])
        alone = cached_file(
            model_id,
            VIDEO_PROCESSOR_NAME,
            revision=options.get("revision"),
            _raise_exceptions_for_missing_entries=False,
        )
        return cls(json.loads(Path(alone).read_text()) if alone else {})
