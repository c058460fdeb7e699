"""Integrated gradients of visual tokens: axioms of the method, and a reference that knows no hooks and no batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone.attribution import integrated_gradients
from conceptshift.lightning_modules.backbone.interventions import Steering
from conceptshift.lightning_modules.backbone.prompts import IGNORED
from conceptshift.tests.families.crops import CROPS
from conceptshift.tests.families.dynamic import DYNAMIC
from PIL import Image
from torch import Tensor

PROMPTS = ["Where is this?", "How many shapes are there in this picture?", "What?"]
TARGETS = ["on the beach", "2", "a red circle and a blue star"]


@pytest.fixture
def inputs(shared_backbone: VisionLanguageModel, pictures: list[Image.Image]) -> dict[str, Tensor]:
    return shared_backbone.encode(pictures[:3], PROMPTS, TARGETS)


@pytest.fixture
def baseline(shared_backbone: VisionLanguageModel, inputs: dict[str, Tensor]) -> Tensor:
    """The mean visual token of the batch."""
    return visual_tokens(shared_backbone, inputs).flatten(0, 1).mean(dim=0)


def image_positions(model: VisionLanguageModel, inputs: dict[str, Tensor]) -> Tensor:
    """Where visual tokens are [B, T]."""
    assert model.encode.image_token_id is not None
    return inputs["input_ids"] == model.encode.image_token_id


def visual_tokens(model: VisionLanguageModel, inputs: dict[str, Tensor]) -> Tensor:
    """[B, P, D]."""
    states = model.read(inputs, model.sites(["projector"])).states["projector"]
    return torch.stack([row[here] for row, here in zip(states, image_positions(model, inputs), strict=True)])


def first_label(inputs: dict[str, Tensor]) -> Tensor:
    return (inputs["labels"] != IGNORED).int().argmax(dim=1)


def logits_of(model: VisionLanguageModel, inputs: dict[str, Tensor], columns: Tensor) -> Tensor:
    """Logit of the token in a column of each sample [B]."""
    rows = torch.arange(len(columns))
    return model.logits(inputs)[rows, columns - 1, inputs["input_ids"][rows, columns]].float()


def gap(model: VisionLanguageModel, inputs: dict[str, Tensor], baseline: Tensor, columns: Tensor) -> Tensor:
    """f(x) − f(x′) [B]."""
    with model.intervene(Steering("projector", baseline, positions="image", mode="replace")):
        without = logits_of(model, inputs, columns)
    return logits_of(model, inputs, columns) - without


def padded_left(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch with its padding in front."""
    shifts = [int(row.sum()) for row in inputs["attention_mask"]]
    return {
        name: torch.stack([row.roll(len(row) - shift) for row, shift in zip(value, shifts, strict=True)])
        if value.shape == inputs["input_ids"].shape
        else value
        for name, value in inputs.items()
    }


def test_attributions_add_up_the_better_the_more_steps(
    shared_backbone: VisionLanguageModel, inputs: dict[str, Tensor], baseline: Tensor
) -> None:
    expected = gap(shared_backbone, inputs, baseline, first_label(inputs))
    errors = []
    for steps in (2, 10, 50):
        sums = torch.stack([one.sum() for one in integrated_gradients(shared_backbone, inputs, baseline, steps)])
        errors.append(float((sums - expected).abs().max()))
    assert expected.abs().max() > 0.1
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.01 * float(expected.abs().max())


def test_parity_with_a_loop_over_samples(
    shared_backbone: VisionLanguageModel, inputs: dict[str, Tensor], baseline: Tensor
) -> None:
    steps, model = 4, shared_backbone.model
    found = integrated_gradients(shared_backbone, inputs, baseline, steps)
    for row, visual in enumerate(visual_tokens(shared_backbone, inputs)):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        column = int(first_label(inputs)[row])
        embedded = model.get_input_embeddings()(ids).detach()
        here = image_positions(shared_backbone, {"input_ids": ids})
        total = torch.zeros_like(visual)
        for step in range(steps):
            point = (baseline + (step + 0.5) / steps * (visual - baseline)).clone().requires_grad_()
            sequence = embedded.masked_scatter(here[:, None], point)
            states = model.get_decoder()(inputs_embeds=sequence[None]).last_hidden_state
            total += torch.autograd.grad(model.lm_head(states)[0, column - 1, ids[column]], point)[0]
        torch.testing.assert_close(found[row], ((visual - baseline) * total / steps).sum(dim=1), atol=1e-5, rtol=1e-4)


def test_batch_and_padding_change_nothing(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], inputs: dict[str, Tensor], baseline: Tensor
) -> None:
    found = integrated_gradients(shared_backbone, inputs, baseline, 3)
    left = integrated_gradients(shared_backbone, padded_left(inputs), baseline, 3)
    for row, attributions in enumerate(found):
        alone = shared_backbone.encode(pictures[row : row + 1], PROMPTS[row : row + 1], TARGETS[row : row + 1])
        for other in (left[row], integrated_gradients(shared_backbone, alone, baseline, 3)[0]):
            torch.testing.assert_close(other, attributions, atol=1e-5, rtol=1e-4)


def test_the_token_that_counts_can_be_named(
    shared_backbone: VisionLanguageModel, inputs: dict[str, Tensor], baseline: Tensor
) -> None:
    last = torch.tensor([int((row != IGNORED).nonzero().max()) for row in inputs["labels"]])
    sums = torch.stack([one.sum() for one in integrated_gradients(shared_backbone, inputs, baseline, 50, last)])
    torch.testing.assert_close(sums, gap(shared_backbone, inputs, baseline, last), atol=0.02, rtol=0.02)
    first = integrated_gradients(shared_backbone, inputs, baseline, 2)
    named = integrated_gradients(shared_backbone, inputs, baseline, 2, first_label(inputs))
    assert all(map(torch.equal, first, named))


def test_an_answer_has_no_visual_tokens(
    shared_backbone: VisionLanguageModel,
    inputs: dict[str, Tensor],
    baseline: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever it says: behind the token that counts, the image token's id changes nothing."""
    model, forward = shared_backbone, shared_backbone.logits_with_graph
    expected = integrated_gradients(model, inputs, baseline, 1)
    last = [int((row != IGNORED).nonzero().max()) for row in inputs["labels"]]
    image_token = model.encode.image_token_id
    assert image_token is not None
    saying = {name: inputs[name].clone() for name in ("input_ids", "labels")}
    for value in saying.values():
        value[range(len(last)), last] = image_token
    # This model itself would look for a picture there.
    monkeypatch.setattr(model, "logits_with_graph", lambda given: forward(given | {"input_ids": inputs["input_ids"]}))
    found = integrated_gradients(model, inputs | saying, baseline, 1)
    assert [len(attributions) for attributions in found] == [64] * len(last)
    assert all(map(torch.equal, found, expected))


def test_a_token_that_is_the_baseline_has_no_share(
    shared_backbone: VisionLanguageModel, inputs: dict[str, Tensor], baseline: Tensor
) -> None:
    chosen = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    is_image = image_positions(shared_backbone, inputs)
    chosen[is_image] = torch.rand(int(is_image.sum()), generator=torch.Generator().manual_seed(0)) < 0.3
    # The rows of this batch begin in their first column.
    with shared_backbone.intervene(Steering("projector", baseline, positions=chosen, mode="replace")):
        found = integrated_gradients(shared_backbone, inputs, baseline, 3)
    for row, attributions in enumerate(found):
        assert torch.equal(attributions == 0, chosen[row][is_image[row]])


def test_runs_within_inference_mode_and_leaves_the_model_as_it_was(
    backbone: VisionLanguageModel, inputs: dict[str, Tensor], baseline: Tensor
) -> None:
    next(backbone.parameters()).requires_grad_(False)
    before = [parameter.requires_grad for parameter in backbone.parameters()]
    expected = integrated_gradients(backbone, inputs, baseline, 2)
    with torch.inference_mode():
        frozen = {name: value.clone() for name, value in inputs.items()}
        found = integrated_gradients(backbone, frozen, baseline.clone(), 2)
    with torch.no_grad():
        also = integrated_gradients(backbone, inputs, baseline, 2)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, also, expected))
    assert [parameter.requires_grad for parameter in backbone.parameters()] == before
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert not any(attributions.requires_grad for attributions in found)


def test_destinations_have_their_own_in_inference_mode(
    tiny: Path, make_model: Callable[..., Path], inputs: dict[str, Tensor], baseline: Tensor
) -> None:
    model = VisionLanguageModel.load(str(tiny))
    model.add_destination(str(make_model(seed=6)), "other")
    alone = integrated_gradients(VisionLanguageModel.load(str(make_model(seed=6))), inputs, baseline, 2)
    original = integrated_gradients(model, inputs, baseline, 2)
    with torch.inference_mode(), model.running_as("other"):
        found = integrated_gradients(model, inputs, baseline, 2)
    torch.testing.assert_close(found, alone)
    assert not torch.allclose(found[0], original[0])
    with torch.inference_mode(), model.running_as("original"):
        torch.testing.assert_close(integrated_gradients(model, inputs, baseline, 2), original)


def test_half_precision_is_close(tiny: Path, inputs: dict[str, Tensor], baseline: Tensor) -> None:
    full = integrated_gradients(VisionLanguageModel.load(str(tiny)), inputs, baseline, 5)
    half = integrated_gradients(VisionLanguageModel.load(str(tiny), dtype="bfloat16"), inputs, baseline, 5)
    for one, other in zip(full, half, strict=True):
        assert other.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.99


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "gemma3"])
def test_pictures_of_several_tiles_and_sizes(family: str) -> None:
    model = VisionLanguageModel(*{**CROPS, **DYNAMIC}[family](), family)
    cells = torch.randint(256, (2, 6, 6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sizes = [(90, 60), (64, 128)]
    shown = [Image.fromarray(one.numpy()).resize(size) for one, size in zip(cells, sizes, strict=True)]
    inputs = model.encode(shown, PROMPTS[:2], TARGETS[:2])
    states = model.read(inputs, model.sites(["projector"])).states["projector"]
    # Not zero: norms turn sharply there, and so few steps would miss it.
    baseline = states[image_positions(model, inputs)].mean(dim=0) + 0.5
    found = integrated_gradients(model, inputs, baseline, 30)
    expected = gap(model, inputs, baseline, first_label(inputs))
    for row, attributions in enumerate(found):
        assert len(attributions) == image_positions(model, inputs)[row].sum()
        assert float((attributions.sum() - expected[row]).abs()) < 0.05 * float(expected.abs().max())
    alone = model.encode(shown[1:], PROMPTS[1:2], TARGETS[1:2])
    torch.testing.assert_close(
        integrated_gradients(model, alone, baseline, 2)[0],
        integrated_gradients(model, inputs, baseline, 2)[1],
        atol=1e-4,
        rtol=1e-3,
    )


def test_bad_input_is_refused(
    shared_backbone: VisionLanguageModel, inputs: dict[str, Tensor], baseline: Tensor, pictures: list[Image.Image]
) -> None:
    def refused(message: str, *arguments: Any, model: VisionLanguageModel = shared_backbone) -> None:
        with pytest.raises(ValueError, match=message):
            integrated_gradients(model, *arguments)

    refused("take at least 1 step, got 0", inputs, baseline, 0)
    refused(r"baseline of shape \[32\] for visual tokens of width 64", inputs, baseline[:32], 1)
    refused("sample 1 has no label in column 3", inputs, baseline, 1, torch.tensor([int(first_label(inputs)[0]), 3, 3]))
    refused("encode the batch with targets", shared_backbone.encode(pictures[:1], PROMPTS[:1]), baseline)
    crossed = VisionLanguageModel(*CROPS["mllama"](), "mllama")
    refused("^mllama: no visual tokens to attribute an answer to: pictures reach", {}, baseline, model=crossed)
