"""Loads models and processors from a folder or the hub, and tells them apart."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils.hub import cached_file

from ...concepts._optional import require
from ...records.paths import located
from . import molmo  # noqa: F401 - makes Molmo known to transformers
from .identity import ADAPTER_CONFIG, check_reachable
from .processors import load_processor

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Precisions of weights: as saved, or one of torch's."""

Quantization = Literal["4bit", "8bit"]
"""Bits that a weight of a linear layer has in memory."""

DeviceMap = Literal["auto"]
"""How the layers of one copy of a model are laid on the devices: by what fits where, as accelerate finds."""


def load_pretrained(
    model_id: str,
    *,
    revision: str | None,
    dtype: str,
    attention: str,
    random_weights: bool,
    quantization: Quantization | None = None,
    device_map: DeviceMap | None = None,
    trust_remote_code: bool = False,
    allow_missing_weights: bool = False,
) -> tuple[Any, Any]:
    """Load a model and its processor; see `VisionLanguageModel.load`.

    Raises:
        ValueError: Nothing can be loaded from `model_id`, or not with these options.
    """
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    place = located(model_id, "model_id")
    check_remote_code(place, revision, trust_remote_code)
    with reading(model_id):
        check_reachable(place)
        _check_no_adapter(place, revision)
        processor = load_processor(place, **source)
        if random_weights:
            config = AutoConfig.from_pretrained(place, **source)
            model = AutoModelForImageTextToText.from_config(
                config, attn_implementation=attention, trust_remote_code=trust_remote_code
            )
            _initialise_by_fan_in(model)
            return model, processor
    quantized = {} if quantization is None else {"quantization_config": quantization_config(quantization)}
    return load_model(
        model_id,
        dtype=dtype,
        attention=attention,
        allow_missing_weights=allow_missing_weights,
        device_map=device_map,
        **source,
        **quantized,
    ), processor


def load_model(
    model_id: str, *, dtype: str, attention: str, allow_missing_weights: bool = False, **options: Any
) -> Any:
    """Load a model without its processor.

    Args:
        model_id: Folder or hub id.
        dtype: Precision, see `DTYPES`.
        attention: Attention implementation.
        allow_missing_weights: Accept that the files lack tensors, which are random then.
        options: As for `from_pretrained`.

    Raises:
        ValueError: Nothing can be loaded from `model_id`, or not all of it.
    """
    place = located(model_id, "model_id")
    with reading(model_id):
        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                place, dtype=dtype, attn_implementation=attention, output_loading_info=True, **options
            )
        except Exception as error:  # libraries that unpack weights raise all kinds
            same = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
            if (method := quantization_of(AutoConfig.from_pretrained(place, **same))) is None:
                raise
            raise ValueError(f"its weights are quantised by {method}: {reason_of(error)}") from error
        model, told = loaded
        _keep_packed(model)
        missing = sorted(told["missing_keys"])
        if missing and not allow_missing_weights:
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise ValueError(
                f"its files have no {missing[0]}{others}, which would be random; give whole files, or accept that with "
                "--model.init_args.allow_missing_weights true"
            )
    return model


def load_skeleton(
    model_id: str, *, revision: str | None, dtype: str, attention: str, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Load a model without weights, on the meta device, and its processor: what there is of them before a download.

    Raises:
        ValueError: Nothing can be loaded from `model_id`.
    """
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    place = located(model_id, "model_id")
    check_remote_code(place, revision, trust_remote_code)
    with reading(model_id):
        check_reachable(place)
        processor = load_processor(place, **source)
        config = AutoConfig.from_pretrained(place, **source)
        saved = config.dtype or torch.float32
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                config,
                dtype=saved if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )
    return model, processor


@contextmanager
def reading(model_id: str) -> Iterator[None]:
    """Within the context what transformers cannot read is an error of one line.

    Raises:
        ValueError: Nothing can be loaded from `model_id`.
    """
    try:
        yield
    except Exception as error:  # libraries that unpack weights raise all kinds
        if str(error).startswith(f"model_id {model_id!r}"):
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model_id {model_id!r}: transformers does not know this model, and the Python code in its repository "
                "is not run; choose another model, or read that code and give fit, validate, test, predict or sweep "
                "--model.init_args.trust_remote_code true and, of a repository on the hub, with "
                "--model.init_args.revision the commit that was read"
            ) from error
        if "does not support an attention implementation" in str(error):
            raise ValueError(
                f"model_id {model_id!r}: this model has another attention implementation; give "
                "--model.init_args.attention eager"
            ) from error
        raise ValueError(
            f"model_id {model_id!r}: no image-text-to-text model can be loaded from it ({reason_of(error)}); give a "
            "folder in the Hugging Face layout or a hub id"
        ) from error


def _check_no_adapter(place: str, revision: str | None) -> None:
    """Refuse what transformers would load together with an adapter, so that no original is left.

    Raises:
        ValueError: There is one.
    """
    options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if cached_file(place, ADAPTER_CONFIG, **options):
        raise ValueError(
            f"it has a PEFT adapter ({ADAPTER_CONFIG}), which would speak in place of the original; give the model "
            "that it was made from, and the adapter with --model.init_args.destination or .adapter"
        )


def _keep_packed(model: nn.Module) -> None:
    """Leave weights of 4 bits as they are on a CPU.

    bitsandbytes packs them anew for it in their first pass, where their rows are made of whole blocks, and unpacks them
    whenever they are saved or compared, not without loss: the model would be another one from then on.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def reason_of(error: BaseException) -> str:
    """What an error of a library says, in one line; of a long one its beginning, to the end of a word."""
    return textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" …")


def check_remote_code(model_id: str, revision: str | None, trust_remote_code: bool) -> None:
    """Refuse to trust code that can change after it was read.

    Raises:
        ValueError: `model_id` is on the hub, and `revision` is no commit.
    """
    if trust_remote_code and not Path(model_id).is_dir() and not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise ValueError(
            f"--model.init_args.trust_remote_code runs Python that {model_id!r} ships, and a branch or tag can move to "
            "other code; give the commit that was read with --model.init_args.revision (40 hexadecimal digits)"
        )


def quantization_config(quantization: Quantization) -> BitsAndBytesConfig:
    """How bitsandbytes is to store the linear layers: NF4 with quantised scales, or LLM.int8().

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    require(("bitsandbytes",), "bitsandbytes")
    if quantization == "8bit":
        # It says of every layer that it computes in float16, whatever the states are in.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def quantization_of(model: Any) -> str | None:
    """By which method the weights of a model, or of one that a configuration is of, are quantised, if they are."""
    config = getattr(getattr(model, "config", model), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if config is None else str(getattr(method, "value", method))


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over named tensors, independent of their order and device."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(json.dumps([str(value.dtype), list(value.shape)]).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _initialise_by_fan_in(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # As large as what the other layers put beside them: positions that whisper are not heard for long.
            nn.init.normal_(module.weight)
