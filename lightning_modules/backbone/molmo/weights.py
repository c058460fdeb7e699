"""How the published names and shapes of weights become the model's, and back when it is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from .configuration import MolmoConfig

Sizes = Callable[[MolmoConfig], list[int]]


class SplitRows(ConversionOps):
    """Cuts one tensor into several along its rows.

    Args:
        sizes: Rows of each part, from the configuration.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Give each target its part of the source, under the target's pattern."""
        (rows,) = (_only(tensors) for tensors in input_dict.values())
        parts = torch.split(rows, self.sizes(kwargs["config"]))
        return {target: part.contiguous() for target, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        """What joins the parts again."""
        return JoinRows(self.sizes)


class JoinRows(ConversionOps):
    """Puts several tensors below each other.

    Args:
        sizes: Rows of each, from the configuration.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Give the one target the sources, in the order of their patterns."""
        parts = [_only(input_dict.pop(source)) for source in source_patterns]
        return {target_patterns[0]: torch.cat(parts)}

    @property
    def reverse_op(self) -> ConversionOps:
        """What cuts them apart again."""
        return SplitRows(self.sizes)


def _only(tensors: Any) -> Tensor:
    """The tensor that a name has, in a list or alone."""
    tensor: Tensor = tensors[0] if isinstance(tensors, list) else tensors
    return tensor


def _attention_rows(config: MolmoConfig) -> list[int]:
    text = config.text_config
    width = text.hidden_size // text.num_attention_heads
    shared = width * (text.num_key_value_heads or text.num_attention_heads)
    return [text.hidden_size, shared, shared]


def _feed_forward_rows(config: MolmoConfig) -> list[int]:
    return [config.text_config.intermediate_size] * 2


def _embedding_rows(config: MolmoConfig) -> list[int]:
    return [config.text_config.vocab_size, config.additional_vocab_size]


def published_weights() -> list[WeightRenaming | WeightConverter]:
    """From the published names to the model's, in the order in which they are applied."""
    vision = r"^model\.vision_backbone"
    renamed = [
        # Two layers are called `ff_out`: the unembedding and, in each block, what ends the MLP.
        (r"^model\.transformer\.ff_out", "lm_head"),
        (r"^model\.transformer\.ln_f", "language_model.norm"),
        (r"^model\.transformer\.blocks", "language_model.layers"),
        (r"\.attn_norm", ".input_layernorm"),
        (r"\.attn_out", ".self_attn.o_proj"),
        (r"\.ff_norm", ".post_attention_layernorm"),
        (r"\.ff_out", ".mlp.down_proj"),
        (rf"{vision}\.image_vit", "vision_tower"),
        (r"^vision_tower\.transformer\.resblocks", "vision_tower.layers"),
        (vision, "connector"),
    ]
    return [
        *(WeightRenaming(published, ours) for published, ours in renamed),
        WeightConverter(
            [r"^model\.transformer\.wte\.embedding", r"^model\.transformer\.wte\.new_embedding"],
            "language_model.embed_tokens.weight",
            operations=[JoinRows(_embedding_rows)],
        ),
        WeightConverter(
            r"\.att_proj",
            [".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj"],
            operations=[SplitRows(_attention_rows)],
        ),
        # The gate comes second.
        WeightConverter(r"\.ff_proj", [".mlp.up_proj", ".mlp.gate_proj"], operations=[SplitRows(_feed_forward_rows)]),
    ]
