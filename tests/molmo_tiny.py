"""Writes a tiny untrained Molmo: the real classes, layout and special tokens at sizes that a test can run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from conceptshift.lightning_modules.backbone.molmo import (
    MolmoConfig,
    MolmoForConditionalGeneration,
    MolmoImageProcessor,
    MolmoProcessor,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_END = "<|endoftext|>"
_PICTURE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")

# Six patches of 4 pixels along a crop, of which neighbours share two at each side: 3 x 3 tokens, new ones 4 pixels on.
IMAGES: dict[str, Any] = {
    "base_image_input_size": [24, 24],
    "image_patch_size": 4,
    "max_crops": 6,
    "overlap_margins": [2, 2],
}

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 4,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def published_config(vocab_size: int, **changes: Any) -> dict[str, Any]:
    """A `config.json` as published, with remote code named in it, at the sizes of the tiny model."""
    return {
        "architectures": ["MolmoForCausalLM"],
        "attention_layer_norm": False,
        "auto_map": {
            "AutoConfig": "config_molmo.MolmoConfig",
            "AutoModelForCausalLM": "modeling_molmo.MolmoForCausalLM",
        },
        "clip_qkv": None,
        "embedding_size": vocab_size,
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 2 * 40,
        "layer_norm_eps": 1e-6,
        "layer_norm_type": "rms",
        "max_position_embeddings": 4096,
        "model_type": "molmo",
        "norm_after": False,
        "num_attention_heads": 6,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "qkv_bias": True,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_position_ids": True,
        "vocab_size": vocab_size,
        "weight_tying": False,
        # Fixed in the published code; named here because the sizes differ.
        "vision_config": VISION,
        "vision_feature_layers": [-2, -4],
        "additional_vocab_size": 8,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **changes,
    }


def write_tiny_molmo(folder: Path, corpus: Iterable[str], *, vocabulary: int = 400, seed: int = 0) -> Path:
    """Write config, random weights, tokenizer and processor.

    Args:
        folder: Where to.
        corpus: Texts that the byte-level BPE tokenizer is trained on.
        vocabulary: Tokens that can be written, at most; those of pictures come on top.
        seed: Of the weights.

    Returns:
        `folder`.
    """
    tokenizer = tiny_tokenizer(corpus, vocabulary)
    processor = MolmoProcessor(MolmoImageProcessor(**IMAGES), tokenizer)
    torch.manual_seed(seed)
    model = MolmoForConditionalGeneration(MolmoConfig(**published_config(len(tokenizer) - len(_PICTURE_TOKENS))))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # Large enough for answers to depend on the picture.
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_tokenizer(corpus: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer without a token of its own to begin a text; picture tokens come behind all others."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=_END,
        pad_token=_END,
        additional_special_tokens=list(_PICTURE_TOKENS),
        chat_template="{{ 'of another model' }}",
    )
