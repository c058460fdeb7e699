"""Saves a steered model as an ordinary one: what is added everywhere is a bias of the layer that writes there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...records.files import replacing, write_json
from .interventions import Steering
from .model import VisionLanguageModel
from .parts import part_finder
from .sites import Site

# Says what was steered, and that the folder may be replaced.
_NOTE = "steering.json"
# What the configuration calls the biases of the projector, and of the layers that write to the residual stream.
_PROJECTOR_BIAS, _BLOCK_BIAS = "multimodal_projector_bias", "mlp_bias"


def save_steered(backbone: VisionLanguageModel, steering: Steering, folder: Path, inputs: dict[str, Tensor]) -> float:
    """Write a model that computes without hooks what a steered one computes, in the Hugging Face layout.

    Args:
        backbone: The model, without adapter.
        steering: Added with one α at every position of a block (`lm.block.k`, positions `all`), or at every visual
            token (`projector`).
        folder: Folder to write; an earlier export is replaced, but not the one that the model was loaded from.
        inputs: Encoded prompts on which both models are compared.

    Returns:
        The largest difference of their logits, as a share of the largest logit.

    Raises:
        ValueError: The steering is no constant, the architecture has no bias there, or the written model differs from
            the steered one by more than rounding or by half of what steering changes; nothing is written then.
    """
    if folder.exists() and not (folder / _NOTE).is_file():
        raise ValueError(f"{folder}: exists, and is no earlier export of a steered model; choose a new folder")
    if folder.resolve() == Path(backbone.source).resolve():
        raise ValueError(f"{folder}: is the model that is steered; choose a new folder")
    (site,) = backbone.sites([steering.site])
    _check_constant(site, steering)
    name = _writing_layer(backbone, site, steering.vector.shape[-1], inputs)
    state, config = _with_bias(backbone.model, name, steering)
    with replacing(folder) as working:
        backbone.model.save_pretrained(working, state_dict=state)
        backbone.processor.save_pretrained(working)
        config.save_pretrained(working)
        note = {"model": backbone.source, "site": steering.site, "alpha": steering.alpha, "bias": f"{name}.bias"}
        write_json(working / _NOTE, note)
        written = VisionLanguageModel.load(str(working), attention=backbone.model.config._attn_implementation)
        plain = backbone.logits(inputs)
        with backbone.intervene(steering):
            expected = backbone.logits(inputs)
        difference, effect = (_distance(other, expected) for other in (written.logits(inputs), plain))
        allowed = 1e-4 if expected.dtype == torch.float32 else 5e-2
        # In low precision a weak steering would get lost in the rounding, whether it is there or not.
        if not difference <= (min(allowed, effect / 2) if any(steering.strengths) else allowed):
            raise ValueError(
                f"{backbone.source}: with a bias in {name} the model's logits differ from the steered ones by "
                f"{difference:.1e} of their size, while steering changes them by {effect:.1e}: this architecture "
                "changes what that layer writes, or α is too small; steer it with hooks"
            )
    return difference


def _distance(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())


def _check_constant(site: Site, steering: Steering) -> None:
    whole = steering.positions == "all" or (site.positions == "image" and steering.positions == "image")
    where = site.name == "projector" or site.name.startswith("lm.block.")
    plain = steering.mode == "add" and len(steering.strengths) == 1 and steering.condition is None
    if not (whole and where and plain and steering.vector.ndim == 1):
        raise ValueError(
            "a bias can only add one vector, with one α, at all positions of `lm.block.k` or at the visual tokens of "
            f"`projector`; got {steering.mode} at {steering.site}, positions {steering.positions!r}, "
            f"α {steering.alpha}{', with a condition' if steering.condition else ''}"
        )


def _writing_layer(backbone: VisionLanguageModel, site: Site, width: int, inputs: dict[str, Tensor]) -> str:
    """Name of the last linear layer of that width that runs before the site has its state."""
    is_projector = site.name == "projector"
    part = part_finder(backbone.model)
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == width
        and (part(name) == "projector" if is_projector else any(module is inner for inner in site.module.modules()))
    ]
    try:
        backbone.logits(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not ran:
        raise ValueError(f"{backbone.source}: no linear layer writes to {site.name}; steer it with hooks")
    return ran[-1]


def _with_bias(model: Any, name: str, steering: Steering) -> tuple[dict[str, Tensor], Any]:
    """The weights with α s in the bias of a layer, and the configuration that has this bias."""
    state, config = dict(model.state_dict()), copy.deepcopy(model.config)
    if f"{name}.bias" not in state:
        at_projector = steering.site == "projector"
        owner, option = (config, _PROJECTOR_BIAS) if at_projector else (config.get_text_config(), _BLOCK_BIAS)
        wanted: dict[str, Tensor] = {}
        if getattr(owner, option, None) is False:
            setattr(owner, option, True)
            with torch.device("meta"):
                wanted = type(model)(config).state_dict()
        if f"{name}.bias" not in wanted:
            raise ValueError(
                f"{type(model).__name__}: {name} has no bias, nor has its configuration an option `{option}` for one; "
                "steer it with hooks"
            )
        state |= {
            other: torch.zeros(like.shape, dtype=model.dtype) for other, like in wanted.items() if other not in state
        }
    bias = state[f"{name}.bias"]
    state[f"{name}.bias"] = (bias.float().cpu() + steering.strengths[0] * steering.vector.float().cpu()).to(bias.dtype)
    return state, config
