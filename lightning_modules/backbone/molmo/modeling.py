"""Molmo-7B-D for transformers 5: a CLIP tower over crops, pooling of 2 x 2 patches, and Qwen2's blocks.

Notation: B samples, C crops of a sample, N crops of the batch that hold a picture, P patches and V visual tokens of a
crop, W width of the vision tower, D hidden size, T tokens.

Where the original computes in float32 inside a model of lower precision (rotations, attention over patches), so does
this; its attention over tokens is the one that `attn_implementation` names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, GenerationMixin, PreTrainedModel, Qwen2Config, Qwen2Model
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

from .configuration import MolmoConfig

# Patches along one side of what becomes a visual token.
_POOL = 2


class MolmoImageAttention(nn.Module):
    """Attention without mask, in float32, between patches of the vision tower or within one visual token.

    Args:
        source: Width of what goes in.
        width: Width of what comes out.
        heads: Number of heads.
    """

    def __init__(self, source: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq = nn.Linear(source, width)
        self.wk = nn.Linear(source, width)
        self.wv = nn.Linear(source, width)
        self.wo = nn.Linear(width, width)

    def forward(self, queries: Tensor, sources: Tensor) -> Tensor:
        """Mix `sources` [n, S, source] for each of `queries` [n, Q, source] into [n, Q, width]."""
        projected = (self.wq(queries), self.wk(sources), self.wv(sources))
        heads = [states.unflatten(-1, (self.heads, -1)).transpose(1, 2).float() for states in projected]
        mixed = functional.scaled_dot_product_attention(*heads).to(queries.dtype)
        states: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return states


class MolmoVisionMLP(nn.Module):
    """Two layers with CLIP's approximation of GELU between them."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """Transform states [N, P + 1, W]."""
        inner = self.w1(states)
        transformed: Tensor = self.w2(inner * torch.sigmoid(1.702 * inner))
        return transformed


class MolmoVisionBlock(GradientCheckpointingLayer):
    """A block of the vision tower, normed before attention and MLP."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention = MolmoImageAttention(width, width, config.num_attention_heads)
        self.feed_forward = MolmoVisionMLP(config)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ffn_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Transform states [N, P + 1, W]."""
        normed = self.attention_norm(hidden_states)
        hidden_states = hidden_states + self.attention(normed, normed)
        after: Tensor = hidden_states + self.feed_forward(self.ffn_norm(hidden_states))
        return after


class MolmoVisionTower(nn.Module):
    """CLIP's image encoder without its last norm, read in the middle.

    Args:
        config: Its sizes.
        feature_layers: Blocks whose outputs are joined.
    """

    def __init__(self, config: CLIPVisionConfig, feature_layers: list[int]) -> None:
        super().__init__()
        width, patch, size = config.hidden_size, config.patch_size, config.image_size
        assert isinstance(patch, int)
        assert isinstance(size, int)
        self.patch: int = patch
        self.patch_embedding = nn.Linear(3 * patch**2, width, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((size // patch) ** 2 + 1, width))
        self.pre_ln = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(MolmoVisionBlock(config) for _ in range(config.num_hidden_layers))
        self.feature_layers = [layer % config.num_hidden_layers for layer in feature_layers]

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode crops.

        Args:
            pixels: Normalised crops [N, 3, height, width].

        Returns:
            Features [N, P, features · W], without the class token.
        """
        down, across = (length // self.patch for length in pixels.shape[-2:])
        patches = pixels.reshape(len(pixels), 3, down, self.patch, across, self.patch)
        # The color comes last within a patch.
        patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(len(pixels), down * across, -1)
        embedded = self.patch_embedding(patches.to(self.patch_embedding.weight.dtype))
        first = self.class_embedding.expand(len(pixels), 1, -1)
        states = self.pre_ln(torch.cat([first, embedded], dim=1) + self.positional_embedding)
        outputs: dict[int, Tensor] = {}
        # What lies behind the last block that is read has no effect. It is kept for the checkpoint's sake.
        for number, block in enumerate(self.layers[: max(self.feature_layers) + 1]):
            states = block(states)
            if number in self.feature_layers:
                outputs[number] = states[:, 1:]
        return torch.cat([outputs[number] for number in self.feature_layers], dim=-1)


class MolmoProjector(nn.Module):
    """A gated MLP from the width of the vision tower to that of the language model."""

    def __init__(self, source: int, inner: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(source, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(source, inner, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """Transform states [N, V, source] into [N, V, width]."""
        projected: Tensor = self.w2(functional.silu(self.w1(states)) * self.w3(states))
        return projected


class MolmoConnector(nn.Module):
    """From the patches of the vision tower to visual tokens."""

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__()
        vision, text = config.vision_config, config.text_config
        features = len(config.vision_feature_layers) * vision.hidden_size
        self.pad_embed = nn.Parameter(torch.empty(2, features))
        self.image_pooling_2d = MolmoImageAttention(features, vision.hidden_size, vision.num_attention_heads)
        self.image_projector = MolmoProjector(vision.hidden_size, text.intermediate_size, text.hidden_size)

    def forward(self, features: Tensor, image_masks: Tensor) -> Tensor:
        """Make visual tokens.

        Args:
            features: What the vision tower gives [N, P, features].
            image_masks: What part of each patch is picture and not padding [N, P]; −1 counts as a part.

        Returns:
            Visual tokens [N, V, D], row by row.
        """
        for embedding, padded in zip(
            self.pad_embed, (image_masks == 0, (image_masks < 1) & (image_masks != 0)), strict=True
        ):
            features = features + embedding * padded[..., None].to(features.dtype)
        side = round(features.shape[1] ** 0.5) // _POOL
        windows = features.reshape(len(features), side, _POOL, side, _POOL, -1).transpose(2, 3)
        windows = windows.reshape(-1, _POOL**2, features.shape[-1])
        pooled = self.image_pooling_2d(windows.mean(dim=1, keepdim=True), windows)
        tokens: Tensor = self.image_projector(pooled.reshape(len(features), side**2, -1))
        return tokens


class MolmoRotaryEmbedding(Qwen2RotaryEmbedding):
    """Qwen2's rotations, kept in float32 where Qwen2 rounds them to the model's precision."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, width of a head] of positions [B, T]; of `x` only the device counts."""
        rotations: tuple[Tensor, Tensor] = super().forward(x.new_empty(0, dtype=torch.float32), position_ids)
        return rotations


class MolmoAttention(Qwen2Attention):
    """Qwen2's attention, with queries and keys rotated in float32."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix states [B, T, D] with those before them, in the cache and here."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # The rotations are in float32, and so is what they are multiplied with.
        rotated = apply_rotary_pos_emb(query, key, *position_embeddings)
        query, key = (states.to(value.dtype) for states in rotated)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(mixed.flatten(2)), weights


class MolmoTextModel(Qwen2Model):
    """Qwen2 with more rows in its input embedding than it can write.

    Args:
        config: Its sizes.
        additional_rows: Rows beyond the vocabulary.
    """

    def __init__(self, config: Qwen2Config, additional_rows: int) -> None:
        super().__init__(config)
        # Without a padding row: what pads is also what begins and ends a text.
        self.embed_tokens = nn.Embedding(config.vocab_size + additional_rows, config.hidden_size)
        self.rotary_emb = MolmoRotaryEmbedding(config)
        for number, block in enumerate(self.layers):
            block.self_attn = MolmoAttention(config, number)
        self.post_init()  # type: ignore[no-untyped-call]


class MolmoForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Molmo: reads one picture and text, writes text.

    Args:
        config: Its sizes.
    """

    config_class = MolmoConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "MolmoVisionBlock"]  # noqa: RUF012 - as in the base class
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: MolmoConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.vision_tower = MolmoVisionTower(config.vision_config, config.vision_feature_layers)
        self.connector = MolmoConnector(config)
        self.language_model = MolmoTextModel(text, config.additional_vocab_size)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model, see `PreTrainedModel.from_pretrained`."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # The published generation configuration does not say what ends a text.
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(model.generation_config, name) is None:
                setattr(model.generation_config, name, getattr(model.config.text_config, name))
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        std = self.config.text_config.initializer_range
        if isinstance(module, MolmoVisionTower):
            init.normal_(module.class_embedding, std=std)
            init.normal_(module.positional_embedding, std=std)
        elif isinstance(module, MolmoConnector):
            init.normal_(module.pad_embed, std=std)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        pixel_values: Tensor | None = None,
        image_masks: Tensor | None = None,
        patch_numbers: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, with `labels` [B, T] also the loss.

        Args:
            input_ids: Token ids [B, T].
            attention_mask: 1 at tokens, 0 at padding [B, T].
            position_ids: Positions [B, T]; by default they count from each row's first token.
            past_key_values: Cache of earlier tokens.
            inputs_embeds: Embeddings [B, T, D] instead of `input_ids`, where there is no picture.
            labels: Tokens to learn [B, T], −100 elsewhere.
            use_cache: Return a cache.
            logits_to_keep: How many last positions get logits, or which; 0 for all.
            pixel_values: Normalised crops [B, C, 3, height, width]; crops of −1 pad the batch.
            image_masks: What part of each patch is picture [B, C, P].
            patch_numbers: For each visual token of a crop the number of the `<im_patch>` among those of its row, −1 for
                one that is left out [B, C, V].
            **kwargs: What Qwen2 takes.

        Raises:
            ValueError: Pictures and `<im_patch>` tokens do not fit each other.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if input_ids is None or image_masks is None or patch_numbers is None:
                raise ValueError(
                    "pixel_values need input_ids, image_masks and patch_numbers beside them; give all that the "
                    "processor makes"
                )
            inputs_embeds = self._add_pictures(inputs_embeds, input_ids, pixel_values, image_masks, patch_numbers)
        if position_ids is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.lm_head.out_features, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _add_pictures(
        self, embeds: Tensor, input_ids: Tensor, pixel_values: Tensor, image_masks: Tensor, patch_numbers: Tensor
    ) -> Tensor:
        """Add visual tokens to the embeddings [B, T, D] of their `<im_patch>` tokens."""
        is_patch = input_ids == self.config.image_token_id
        if not torch.equal(is_patch.sum(dim=1), (patch_numbers >= 0).sum(dim=(1, 2))):
            raise ValueError(
                f"input_ids have {is_patch.sum(dim=1).tolist()} `<im_patch>` a row where patch_numbers place "
                f"{(patch_numbers >= 0).sum(dim=(1, 2)).tolist()}; let the processor encode text and picture together"
            )
        # Crops that pad the batch are left out: they have no visual tokens.
        is_crop = (pixel_values != -1).flatten(2).any(dim=2)
        tokens = self.connector(self.vision_tower(pixel_values[is_crop]), image_masks[is_crop])
        numbers = patch_numbers[is_crop]
        crop, cell = (numbers >= 0).nonzero(as_tuple=True)
        row = is_crop.nonzero()[crop, 0]
        # Column of the k-th `<im_patch>` of each row [B, T]; what follows them is never asked for.
        columns = is_patch.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        places = (row, columns[row, numbers[crop, cell]])
        return embeds.index_put(places, tokens[crop, cell].to(embeds.dtype), accumulate=True)
