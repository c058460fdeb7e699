"""`conceptshift architectures`: which parts are found in the models that the installed transformers knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..lightning_modules.backbone.structure import Structure
from ..records.files import write_whole
from .command import run_command

# Default configurations that describe no model; what is changed here does not move any part.
_MENDED: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] * 32}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 512}},
    "emu3": {"vocabulary_map": {"<image>": 151851, "<|extra_200|>": 151846}},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "gemma4_unified": {"vision_config": {"model_type": "gemma4_unified_vision"}},
    "granite4_vision": {"deepstack_layer_map": [(-1, 0)], "downsample_rate": "1/2"},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 256,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        }
    },
}


@dataclass(frozen=True)
class Architecture:
    """What is found in one architecture.

    Attributes:
        model_type: Its name in transformers.
        supported: Whether hidden states can be read and become words.
        reason: Why not, or what cannot be had all the same.
        blocks: Name of the list of the language model's blocks.
        norm: Name of the norm between the last block and the unembedding.
        unembedding: Name of the unembedding.
        image_token: The configuration's key for the token that stands for one visual token.
        projector: Name of what makes visual tokens of the vision tower's states.
    """

    model_type: str
    supported: bool
    reason: str
    blocks: str | None = None
    norm: str | None = None
    unembedding: str | None = None
    image_token: str | None = None
    projector: str | None = None


def architectures(json: Path | None = None) -> None:
    """List the image-text-to-text architectures of the installed transformers, and which of their parts are found.

    Every model is built on the meta device, where weights take no memory.

    Args:
        json: File to write the list to.
    """
    transformers.logging.set_verbosity_error()
    found = [inspect(model_type) for model_type in tqdm(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, delay=2)]
    for one in found:
        print(f"{one.model_type:<24}{'yes' if one.supported else 'no':<5}{one.reason}")
    print(f"{sum(one.supported for one in found)} of {len(found)} in transformers {transformers.__version__}")
    if json is not None:
        text = dumps([asdict(one) for one in found], indent=1)
        write_whole(json, lambda working: working.write_text(text))


def inspect(model_type: str) -> Architecture:
    """Build an architecture on the meta device and look for its parts."""
    try:
        config = AutoConfig.for_model(model_type, **_MENDED.get(model_type, {}))
        with torch.device("meta"):
            structure = Structure(AutoModelForImageTextToText.from_config(config))
    except Exception as error:  # whatever the library stumbles over is the answer
        return Architecture(model_type, False, f"its default configuration makes no model: {_first_line(error)}")
    name_of, parts = structure.name_of, {}
    try:
        parts["blocks"] = name_of(structure.blocks)
        parts["unembedding"] = name_of(structure.head)
        parts["norm"] = name_of(structure.norm) or "none: the blocks end in a norm"
    except ValueError as error:
        return Architecture(model_type, False, str(error), **parts)
    parts["image_token"] = structure.image_token_key
    parts["projector"] = name_of(structure.projector)
    enters = structure.has_visual_tokens or structure.has_cross_attention or structure.is_encoder_decoder
    return Architecture(model_type, enters, structure.without_visual_tokens, **parts)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def run(args: Sequence[str]) -> None:
    """Run the command."""
    run_command(architectures, args)
