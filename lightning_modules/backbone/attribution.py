"""How much each visual token adds to what a model says: integrated gradients (arXiv 1703.01365, equation 1).

Notation: B samples, T columns, P visual tokens of a sample, M of all samples, D hidden size; f the logit of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from .hooks import attach
from .model import VisionLanguageModel
from .prompts import IGNORED


def integrated_gradients(
    backbone: VisionLanguageModel,
    inputs: dict[str, Tensor],
    baseline: Tensor,
    steps: int = 50,
    targets: Tensor | None = None,
) -> list[Tensor]:
    """Attribute the logit of one answer token of each sample to its visual tokens.

    A token's attribution is (x − x′) · ∫₀¹ ∇f(x′ + a (x − x′)) da: what it adds to f on the way from the baseline x′ to
    x, where all visual tokens of the picture go together and the text stays. The integral is a sum by the midpoint
    rule, so that all attributions of a sample add up to f(x) − f(x′) but for its error. Samples do not affect each
    other. The model is left as it is, and may be run within `torch.inference_mode`; a model that sees its picture
    deeper in the language model, too, keeps what it sees there.

    Args:
        backbone: The model; steered, with an adapter or as another variant, if it is so now.
        inputs: Encoded batch with labels, with any padding.
        baseline: x′ [D], the same for every visual token, such as the mean one.
        steps: Points of the sum; each is a pass forwards and backwards over the batch.
        targets: Column of each sample's token that counts [B], one that has a label; by default its first. It is taken
            from the labels, where no beginning of sequence stands before an answer.

    Returns:
        For each sample the attributions of its visual tokens [P], in the order of its sequence, float32 on the CPU.

    Raises:
        ValueError: The model has no visual tokens, a sample has no such answer token, or the baseline was made for
            another model.
    """
    if reason := backbone.structure.without_visual_tokens:
        raise ValueError(f"{backbone.source}: no visual tokens to attribute an answer to: {reason}")
    if steps < 1:
        raise ValueError(f"integrated gradients take at least 1 step, got {steps}")
    if "labels" not in inputs:
        raise ValueError("integrated gradients are of a token of given answers; encode the batch with targets")
    (site,) = backbone.sites(["projector"])
    # Tensors that can be part of a graph, whatever surrounds this.
    with torch.inference_mode(False), torch.enable_grad(), _frozen(backbone):
        given = {name: value.clone() for name, value in inputs.items()}
        is_image = torch.eq(given["input_ids"], cast(int, backbone.encode.image_token_id))
        is_image &= given["attention_mask"].bool() & (given["labels"] == IGNORED)
        columns = _columns(given["labels"], targets)
        rows = torch.arange(len(columns))
        tokens = given["input_ids"].cpu()[rows, columns]
        path = _Path(baseline.clone(), is_image)
        handle = attach(site, path)
        try:
            for step in range(steps):
                path.share = (step + 0.5) / steps
                # The state in column p predicts the token in column p + 1.
                logits = backbone.logits_with_graph(given)[rows, columns - 1, tokens]
                path.add(torch.autograd.grad(logits.float().sum(), path.point)[0])
        finally:
            handle.remove()
    return list(torch.split(path.attributions(steps).cpu(), is_image.sum(dim=1).tolist()))


class _Path:
    """The straight line from the baseline to the visual tokens, on which the model is put at the first block.

    Args:
        baseline: x′ [D].
        is_image: Where visual tokens are [B, T].
    """

    def __init__(self, baseline: Tensor, is_image: Tensor) -> None:
        self.baseline = baseline
        self.is_image = is_image
        self.share = 0.0
        self.point = self._difference = self._sum = torch.zeros(0)

    def __call__(self, state: Tensor) -> Tensor:
        """The states that enter the first block [B, T, D], with visual tokens on the line."""
        is_image, baseline = self.is_image.to(state.device), self.baseline.to(state.device, torch.float32)
        if baseline.shape != state.shape[-1:]:
            raise ValueError(
                f"a baseline of shape {list(baseline.shape)} for visual tokens of width {state.shape[-1]}; it was made "
                "for another model"
            )
        # In float32, so that half precision rounds the points, and not what is added up.
        self._difference = state.detach()[is_image].float() - baseline
        self.point = (baseline + self.share * self._difference).requires_grad_()
        moved = state.detach().clone()
        moved[is_image] = self.point.to(state.dtype)
        return moved

    def add(self, gradient: Tensor) -> None:
        """Add the gradient at one point [M, D]."""
        self._sum = gradient if len(self._sum) == 0 else self._sum + gradient

    def attributions(self, steps: int) -> Tensor:
        """Of all visual tokens [M]."""
        return (self._difference * self._sum).sum(dim=1) / steps


def _columns(labels: Tensor, targets: Tensor | None) -> Tensor:
    """Column of each sample's token that counts [B], on the CPU."""
    answers = (labels != IGNORED).cpu()
    columns = answers.to(torch.uint8).argmax(dim=1) if targets is None else targets.cpu()
    missing = (~answers.gather(1, columns[:, None])).nonzero()[:, 0].tolist()
    if missing:
        raise ValueError(
            f"integrated gradients of an answer's token: sample {missing[0]} has no label in column "
            f"{int(columns[missing[0]])}; encode the batch with its answers, and name one of their tokens"
        )
    return columns


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the context no parameter has gradients, so that no graph is built before the visual tokens."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
