"""Molmo-7B-D once more, in plain torch from its description: published names, one sample, no cache, no padding.

Nothing here is shared with the model under test.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]
Sizes = dict[str, int]


def published_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published weights.

    Args:
        sizes: `vocabulary`, `additional`, `width`, `layers`, `heads`, `kv_heads`, `inner` of the language model
            (`inner` is the width of the MLP, half the published number); `vision_width`, `vision_layers`,
            `vision_heads`, `vision_inner`, `patch`, `patches` (along one side) of the vision tower.
    """
    width, vision, inner = sizes["width"], sizes["vision_width"], sizes["inner"]
    head = width // sizes["heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.embedding": (sizes["vocabulary"], width),
        "transformer.wte.new_embedding": (sizes["additional"], width),
        "transformer.ln_f.weight": (width,),
        "transformer.ff_out.weight": (sizes["vocabulary"], width),
        "vision_backbone.pad_embed": (2, 2 * vision),
        "vision_backbone.image_vit.class_embedding": (vision,),
        "vision_backbone.image_vit.positional_embedding": (sizes["patches"] ** 2 + 1, vision),
        "vision_backbone.image_vit.patch_embedding.weight": (vision, 3 * sizes["patch"] ** 2),
        "vision_backbone.image_vit.pre_ln.weight": (vision,),
        "vision_backbone.image_vit.pre_ln.bias": (vision,),
        "vision_backbone.image_projector.w1.weight": (inner, vision),
        "vision_backbone.image_projector.w3.weight": (inner, vision),
        "vision_backbone.image_projector.w2.weight": (width, inner),
    }
    for letter in "qkvo":
        source = vision if letter == "o" else 2 * vision
        shapes[f"vision_backbone.image_pooling_2d.w{letter}.weight"] = (vision, source)
        shapes[f"vision_backbone.image_pooling_2d.w{letter}.bias"] = (vision,)
    for number in range(sizes["layers"]):
        block = f"transformer.blocks.{number}."
        rows = width + 2 * sizes["kv_heads"] * head
        shapes |= {
            f"{block}att_proj.weight": (rows, width),
            f"{block}att_proj.bias": (rows,),
            f"{block}attn_out.weight": (width, width),
            f"{block}attn_norm.weight": (width,),
            f"{block}ff_norm.weight": (width,),
            f"{block}ff_proj.weight": (2 * inner, width),
            f"{block}ff_out.weight": (width, inner),
        }
    for number in range(sizes["vision_layers"]):
        block = f"vision_backbone.image_vit.transformer.resblocks.{number}."
        for letter in "qkvo":
            shapes[f"{block}attention.w{letter}.weight"] = (vision, vision)
            shapes[f"{block}attention.w{letter}.bias"] = (vision,)
        shapes |= {
            f"{block}feed_forward.w1.weight": (sizes["vision_inner"], vision),
            f"{block}feed_forward.w1.bias": (sizes["vision_inner"],),
            f"{block}feed_forward.w2.weight": (vision, sizes["vision_inner"]),
            f"{block}feed_forward.w2.bias": (vision,),
        }
        for norm in ("attention_norm", "ffn_norm"):
            shapes[f"{block}{norm}.weight"] = shapes[f"{block}{norm}.bias"] = (vision,)
    return {f"model.{name}": shape for name, shape in shapes.items()}


def random_weights(sizes: Sizes, seed: int = 0) -> Weights:
    """Random weights under the published names."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in published_shapes(sizes).items():
        value = torch.randn(shape, generator=generator)
        if "norm" in name or "ln" in name:
            value = 0.2 * value + (1 if name.endswith("weight") else 0)
        elif len(shape) == 2 and "embedding" not in name.rsplit(".", 1)[-1]:
            value = value * shape[1] ** -0.5
        weights[name] = value
    return weights


def picture_positions(tiling: tuple[int, int], side: int, left: int, right: int) -> Tensor:
    """Position in the sequence of each visual token [1 + i · j, side²], −100 for those left out; closed form.

    Args:
        tiling: Rows i and columns j of crops.
        side: Tokens along one side of a crop.
        left: Tokens that a crop shares at its left and top.
        right: Tokens that a crop shares at its right and bottom.
    """
    window = side - left - right
    columns = tiling[1] * window + left + right
    # What begins the text, then `<im_start>`; the whole picture; its `<im_end>` and the second `<im_start>`.
    second = 2 + side * (side + 1) + 2
    crops = [[2 + (side + 1) * r + c for r in range(side) for c in range(side)]]
    for a in range(tiling[0]):
        for b in range(tiling[1]):
            cells = []
            for r in range(side):
                for c in range(side):
                    row = (r >= left or a == 0) and (r < side - right or a == tiling[0] - 1)
                    column = (c >= left or b == 0) and (c < side - right or b == tiling[1] - 1)
                    position = second + (window * a + r) * (columns + 1) + window * b + c
                    cells.append(position if row and column else -100)
            crops.append(cells)
    return torch.tensor(crops)


def patches_of(crops: Tensor, patch: int) -> Tensor:
    """Crops [C, 3, height, width] as the published processor gives them: patches [C, P, values], color fastest."""
    rows = [
        torch.stack(
            [
                crop[:, y : y + patch, x : x + patch].permute(1, 2, 0).flatten()
                for y in range(0, crop.shape[1], patch)
                for x in range(0, crop.shape[2], patch)
            ]
        )
        for crop in crops
    ]
    return torch.stack(rows)


def logits(
    weights: Weights,
    sizes: Sizes,
    feature_layers: list[int],
    input_ids: Tensor,
    images: Tensor | None = None,
    image_masks: Tensor | None = None,
    image_input_idx: Tensor | None = None,
) -> Tensor:
    """Logits [T, vocabulary] of one sample.

    Args:
        weights: Under the published names.
        sizes: As of `random_weights`.
        feature_layers: Blocks of the vision tower that are read, counted from 0.
        input_ids: Token ids [T].
        images: Patches of the crops [C, P, values], the values of a patch in the order row, column, color.
        image_masks: Of each patch [C, P].
        image_input_idx: Position in the sequence of each visual token, negative for those left out [C, V].
    """
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    table = torch.cat([weights["transformer.wte.embedding"], weights["transformer.wte.new_embedding"]])
    states = table[input_ids].clone()
    if images is not None:
        assert image_masks is not None
        assert image_input_idx is not None
        visual = _visual_tokens(weights, sizes, feature_layers, images, image_masks)
        for crop in range(len(images)):
            for cell, position in enumerate(image_input_idx[crop].tolist()):
                if position >= 0:
                    states[position] += visual[crop, cell]
    for number in range(sizes["layers"]):
        states = _block(weights, f"transformer.blocks.{number}.", sizes, states)
    return _rms(states, weights["transformer.ln_f.weight"]) @ weights["transformer.ff_out.weight"].T


def _rms(states: Tensor, weight: Tensor) -> Tensor:
    return states / (states.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _block(weights: Weights, block: str, sizes: Sizes, states: Tensor) -> Tensor:
    width, heads, kv_heads, inner = (sizes[name] for name in ("width", "heads", "kv_heads", "inner"))
    head, length = width // heads, len(states)
    fused = _rms(states, weights[f"{block}attn_norm.weight"]) @ weights[f"{block}att_proj.weight"].T
    fused = fused + weights[f"{block}att_proj.bias"]
    query = _rotate(fused[:, :width].reshape(length, heads, head))
    key = _rotate(fused[:, width : width + kv_heads * head].reshape(length, kv_heads, head))
    value = fused[:, width + kv_heads * head :].reshape(length, kv_heads, head)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = []
    for number in range(heads):
        shared = number // (heads // kv_heads)
        scores = query[:, number] @ key[:, shared].T / math.sqrt(head)
        mixed.append(scores.masked_fill(future, -math.inf).softmax(-1) @ value[:, shared])
    states = states + torch.cat(mixed, dim=1) @ weights[f"{block}attn_out.weight"].T
    packed = _rms(states, weights[f"{block}ff_norm.weight"]) @ weights[f"{block}ff_proj.weight"].T
    up, gate = packed[:, :inner], packed[:, inner:]
    return states + (gate * torch.sigmoid(gate) * up) @ weights[f"{block}ff_out.weight"].T


def _rotate(heads: Tensor) -> Tensor:
    """Rotate each number of the first half of a head with its partner in the second half."""
    half = heads.shape[-1] // 2
    angles = torch.arange(len(heads))[:, None] * 1e6 ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _attend(weights: Weights, name: str, heads: int, query: Tensor, source: Tensor) -> Tensor:
    """Attention of `query` [Q, W] to `source` [S, W]."""
    q, k, v = (
        states @ weights[f"{name}.w{letter}.weight"].T + weights[f"{name}.w{letter}.bias"]
        for letter, states in (("q", query), ("k", source), ("v", source))
    )
    width = q.shape[1] // heads
    mixed = []
    for number in range(heads):
        columns = slice(number * width, (number + 1) * width)
        mixed.append((q[:, columns] @ k[:, columns].T / math.sqrt(width)).softmax(-1) @ v[:, columns])
    return torch.cat(mixed, dim=1) @ weights[f"{name}.wo.weight"].T + weights[f"{name}.wo.bias"]


def _visual_tokens(
    weights: Weights, sizes: Sizes, feature_layers: list[int], images: Tensor, image_masks: Tensor
) -> Tensor:
    """Visual tokens [C, V, width]."""
    tower, pool, project = (f"vision_backbone.{name}" for name in ("image_vit", "image_pooling_2d", "image_projector"))
    first_embed, second_embed = weights["vision_backbone.pad_embed"]
    side = sizes["patches"]
    crops = []
    for patches, mask in zip(images, image_masks, strict=True):
        outputs = _vision_outputs(weights, tower, sizes, patches)
        features = torch.cat([outputs[layer][1:] for layer in feature_layers], dim=1)
        if bool((patches == -1).all()):
            features = features * 0
        features = features + (mask == 0).float()[:, None] * first_embed
        features = features + ((mask < 1) & (mask != 0)).float()[:, None] * second_embed
        cells = []
        for row in range(0, side, 2):
            for column in range(0, side, 2):
                window = features[[side * (row + dy) + column + dx for dy in (0, 1) for dx in (0, 1)]]
                pooled = _attend(weights, pool, sizes["vision_heads"], window.mean(0, keepdim=True), window)
                gate = pooled @ weights[f"{project}.w1.weight"].T
                up = pooled @ weights[f"{project}.w3.weight"].T
                cells.append((gate * torch.sigmoid(gate) * up) @ weights[f"{project}.w2.weight"].T)
        crops.append(torch.cat(cells))
    return torch.stack(crops)


def _vision_outputs(weights: Weights, tower: str, sizes: Sizes, patches: Tensor) -> list[Tensor]:
    """What each block gives [P + 1, vision width]."""

    def norm(states: Tensor, name: str) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.layer_norm(states, weight.shape, weight, bias, 1e-5)

    embedded = patches @ weights[f"{tower}.patch_embedding.weight"].T
    states = torch.cat([weights[f"{tower}.class_embedding"][None], embedded])
    states = norm(states + weights[f"{tower}.positional_embedding"], f"{tower}.pre_ln")
    outputs = []
    for number in range(sizes["vision_layers"]):
        block = f"{tower}.transformer.resblocks.{number}"
        normed = norm(states, f"{block}.attention_norm")
        states = states + _attend(weights, f"{block}.attention", sizes["vision_heads"], normed, normed)
        mlp = f"{block}.feed_forward"
        inner = norm(states, f"{block}.ffn_norm") @ weights[f"{mlp}.w1.weight"].T + weights[f"{mlp}.w1.bias"]
        inner = inner * torch.sigmoid(1.702 * inner)
        states = states + inner @ weights[f"{mlp}.w2.weight"].T + weights[f"{mlp}.w2.bias"]
        outputs.append(states)
    return outputs
