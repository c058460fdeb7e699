"""The parts of a transformers vision-language model, found by the role that they play.

Most models keep them where the library's own accessors point. What is named otherwise is in the tables here: a new
model needs a name in a table, never a class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

# Where a language model keeps its list of blocks, and what may lie between the accessor's module and that list.
_BLOCK_LISTS = ("layers", "layer", "block", "blocks", "h")
_INNER = ("model", "decoder", "bert", "transformer", "backbone", "language_model", "encoder")
# The norm between the last block and the unembedding; a BERT head has its own transform there.
_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "embedding_norm", "layer_norm")
_HEAD_TRANSFORM = "cls.predictions.transform"
_HEADS = ("lm_head", "output", "cls.predictions.decoder", "embed_out")
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "img_context_token_id", "media_token_id")
# What models do with the unembedding's output: keys of their configurations.
_SCALES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logit_scale": lambda logits, value: logits * value,
    "logits_scaling": lambda logits, value: logits / value,
    "final_logit_softcapping": lambda logits, value: torch.tanh(logits / value) * value,
}
_PROJECTORS = (
    "multi_modal_projector", "mm_projector", "projector", "connector", "aligner", "merger", "resampler",
    "language_projection", "vision_projection", "visual_projection", "image_to_text_projection", "embed_vision",
    "vision_embed_tokens", "visual_embeddings_table", "perceiver", "vqmodel",
)  # fmt: skip
_NOT_PICTURES = ("audio", "generation", "video")
_CROSS_ATTENTION = ("cross_attn", "crossattention", "cross_attention", "encoder_attn", "gated_cross_attn", "encdec")


@dataclass(frozen=True)
class Unembedding:
    """W_U and what the model does with its output: final-norm states → logits.

    Attributes:
        head: The linear layer.
        scales: Functions of the configuration that follow it, with their values.
    """

    head: Any
    scales: tuple[tuple[str, float], ...] = ()

    @property
    def shape(self) -> torch.Size:
        """Of W_U [tokens, D]."""
        shape: torch.Size = self.head.weight.shape
        return shape

    @property
    def weight(self) -> Tensor:
        """W_U [tokens, D]: the model's own, or with what an adapter that speaks makes of it."""
        weight: Tensor = self.head.weight
        adapted = isinstance(self.head, BaseTunerLayer | AuxiliaryTrainingWrapper) and not self.head.disable_adapters
        if not adapted:
            return weight
        with torch.no_grad():
            each = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
            effect: Tensor = self.head(each) - self.head(torch.zeros_like(each[:1]))
        return effect.T.contiguous()

    def __call__(self, states: Tensor) -> Tensor:
        """Logits [..., tokens] of states [..., D] that went through the final norm."""
        logits: Tensor = self.head(states)
        for name, value in self.scales:
            logits = _SCALES[name](logits, value)
        return logits


class Structure:
    """The parts of one model; each is looked for when it is asked for.

    Args:
        model: The transformers model; on the meta device, too.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def forget(self) -> None:
        """Look for everything anew: an adapter may have wrapped what was found."""
        for name in set(vars(self)) - {"model"}:
            delattr(self, name)

    @cached_property
    def decoder(self) -> nn.Module:
        """The module of the language model that holds its blocks.

        Raises:
            ValueError: There is no list of blocks.
        """
        return self._path[-1]

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the language model; of an encoder-decoder model those of the decoder."""
        lists = (getattr(self.decoder, name, None) for name in _BLOCK_LISTS)
        return next(found for found in lists if _is_list(found))

    @cached_property
    def norm(self) -> nn.Module:
        """What stands between the last block and the unembedding; nothing but the identity in post-norm models.

        Raises:
            ValueError: There is nothing under a known name, and the blocks do not end in a norm.
        """
        for holder in reversed(self._path):
            for name in (_HEAD_TRANSFORM, *_NORMS):
                if isinstance(module := _attribute(holder, name), nn.Module):
                    return module
        *_, last = (module for module in self.blocks[-1].modules() if [*module.parameters(recurse=False)])
        if "norm" in type(last).__name__.lower():
            return nn.Identity()
        children = ", ".join(name for name, _ in self.decoder.named_children())
        raise ValueError(
            f"{type(self.decoder).__name__} has no final norm among {', '.join(_NORMS)}; it has {children}"
        )

    @property
    def head(self) -> Any:
        """The linear layer that makes logits; not kept, because an adapter may wrap it.

        Raises:
            ValueError: The model has none: it writes no text.
        """
        heads = [self.model.get_output_embeddings()]
        heads += [_attribute(holder, name) for holder in (self.model, *self._path) for name in _HEADS]
        head = next((head for head in heads if isinstance(getattr(head, "weight", None), Tensor)), None)
        if head is None:
            raise ValueError(f"{type(self.model).__name__} has no unembedding: it writes no text")
        return head

    @property
    def scales(self) -> tuple[tuple[str, float], ...]:
        """What the configuration says is done with logits; not every model does as it says."""
        configs = (self.model.config.get_text_config(), self.model.config)
        found = [
            (name, next((value for one in configs if (value := getattr(one, name, None))), None)) for name in _SCALES
        ]
        return tuple((name, float(value)) for name, value in found if value not in (None, 1))

    @cached_property
    def image_token_key(self) -> str | None:
        """Key of the configuration that names the token that stands for one visual token."""
        return next((name for name in _IMAGE_TOKENS if hasattr(self.model.config, name)), None)

    def image_token_id(self, processor: Any) -> int | None:
        """Id of the token that stands for one visual token; none where neither model nor processor names one.

        Args:
            processor: The model's processor.
        """
        value = getattr(self.model.config, self.image_token_key, None) if self.image_token_key else None
        return getattr(processor, "image_token_id", None) if value is None else int(value)

    @cached_property
    def image_encoder(self) -> nn.Module | None:
        """The vision tower; none where pictures go straight into the language model."""
        encoder = self.model.get_encoder(modality="image")
        return None if encoder is self.model or encoder is self.model.get_decoder() else encoder

    @cached_property
    def image_blocks(self) -> list[nn.Module]:
        """The blocks of the vision tower: its longest list of that name, or of any."""
        if self.image_encoder is None:
            return []
        named = [(name, one) for name, one in self.image_encoder.named_modules() if isinstance(one, nn.ModuleList)]
        lists = [one for name, one in named if name.rpartition(".")[2] in (*_BLOCK_LISTS, "resblocks")]
        longest = max((list(one) for one in lists or [one for _, one in named]), key=len, default=[])
        # Of a tower in stages, the last block of each.
        return [one[-1] if isinstance(one, nn.ModuleList) else one for one in longest]

    @cached_property
    def projector(self) -> nn.Module | None:
        """What makes visual tokens of the vision tower's states."""
        language = {id(module) for module in (*self._path, *self.blocks.modules(), self.head)}
        candidates: list[tuple[str, nn.Module]] = [
            (name.rpartition(".")[2], module)
            for name, module in self.model.named_modules()
            if id(module) not in language
        ]
        for whole in (True, False):
            for piece in _PROJECTORS:
                for name, module in candidates:
                    if name == piece or (not whole and piece in name and not name.startswith(_NOT_PICTURES)):
                        return module
        return None

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the prompt is read by an encoder of its own, and the decoder's sequence holds the answer only."""
        return bool(self.model.config.is_encoder_decoder)

    @cached_property
    def has_cross_attention(self) -> bool:
        """Whether pictures reach the language model through cross-attention, and not as tokens of its sequence."""
        names = (name for name, _ in self.decoder.named_modules())
        return any(part in name for name in names for part in _CROSS_ATTENTION)

    @property
    def has_visual_tokens(self) -> bool:
        """Whether the language model's sequence holds visual tokens."""
        return not self.without_visual_tokens

    @property
    def without_visual_tokens(self) -> str:
        """Why the language model's sequence holds no visual tokens that could be found; empty where it does."""
        if self.is_encoder_decoder:
            return "an encoder reads picture and prompt, and the decoder's sequence holds the answer only"
        if self.has_cross_attention:
            return "pictures reach the language model through cross-attention"
        if self.image_token_key is None:
            return "the configuration names no image token"
        return ""

    def name_of(self, module: nn.Module | None) -> str | None:
        """The name of a module of this model."""
        return next((name for name, other in self.model.named_modules() if other is module), None)

    @cached_property
    def _path(self) -> list[nn.Module]:
        """From what the library calls the decoder inwards to the module that holds the blocks."""
        path = [self.model.get_decoder()]
        while not any(_is_list(getattr(path[-1], name, None)) for name in _BLOCK_LISTS):
            inner = next(
                (child for name in _INNER if isinstance(child := getattr(path[-1], name, None), nn.Module)), None
            )
            if inner is None:
                raise ValueError(f"{type(path[0]).__name__} has no list of blocks among {', '.join(_BLOCK_LISTS)}")
            path.append(inner)
        return path


def _is_list(found: Any) -> TypeGuard[nn.ModuleList]:
    return isinstance(found, nn.ModuleList) and len(found) > 0


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
