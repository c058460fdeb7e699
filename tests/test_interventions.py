"""Hooks that add a vector or ablate a direction.

α = 0 changes nothing, an ablated direction is gone, only the selected positions change, nothing outlives its context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone import Generation, Role, Selector, Steering
from conceptshift.lightning_modules.backbone.prompts import append_answers
from PIL import Image
from torch import Tensor

PROMPTS = [
    "Where is this?",
    "How many shapes are there in this picture?",
    "What?",
    "Is the circle red or blue?",
    "Who?",
]
TARGETS = ["on the beach", "2", "a red circle and a blue star", "red", "a heart in space"]
POSITIONS = ["all", "prompt", "last_prompt", "image", "text", "answer", "generated", "0", "3:70", "66:"]
SITES = ["projector", "lm.embed", "lm.block.0", "lm.block.2", "lm.norm"]


def ablation(site: str, vector: Tensor, positions: str | Tensor = "all") -> Steering:
    return Steering(site, vector, positions=positions, mode="project_away")


def encoded(
    model: VisionLanguageModel, pictures: Sequence[Image.Image], rows: Sequence[int], targets: bool
) -> dict[str, Tensor]:
    answers = [TARGETS[row] for row in rows] if targets else None
    return model.encode([pictures[row] for row in rows], [PROMPTS[row] for row in rows], answers)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("mode", ["generate", "read"])
def test_zero_strength_is_exactly_the_unsteered_model(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor, site: str, mode: str
) -> None:
    model = shared_backbone
    inputs = encoded(model, pictures, range(5), targets=mode == "read")
    sites = model.sites(["lm.*"])

    def run() -> Generation:
        return model.generate(inputs, 5, sites) if mode == "generate" else model.read(inputs, sites)

    plain = run()
    with model.intervene(Steering(site, vector, alpha=0.0)):
        steered = run()
    after = run()
    for other in (steered, after):
        assert other.texts == plain.texts
        assert all(torch.equal(other.states[name], plain.states[name]) for name in plain.states)


# Selectors that have no visual token among their positions.
_NO_IMAGES = ("last_prompt", "text", "answer", "generated", "0")


def _selected(site: str, positions: str, generation: Generation) -> Tensor:
    """Positions that are changed [B, T]: at the projector visual tokens only."""
    roles = generation.token_map.roles
    selected = Selector.parse(positions).mask(generation.token_map, 0, roles.shape[1])
    return selected & (roles == Role.IMAGE) if site == "projector" else selected


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_only_the_selected_positions_change(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor, site: str, positions: str
) -> None:
    model = shared_backbone
    inputs = encoded(model, pictures, range(5), targets=True)
    here = model.sites([site])
    plain = model.read(inputs, here)
    with model.intervene(Steering(site, vector, alpha=1.5, positions=positions)):
        steered = model.read(inputs, here)
    change = steered.states[site] - plain.states[site]
    selected = _selected(site, positions, plain)
    assert selected.any() == (site != "projector" or positions not in _NO_IMAGES)
    assert not selected[plain.token_map.roles == Role.PAD].any()
    assert (change[~selected] == 0).all()
    torch.testing.assert_close(change[selected], (1.5 * vector).expand(int(selected.sum()), 64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("site", ["lm.block.0", "lm.norm"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_generation_steers_what_reading_steers(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor, site: str, positions: str
) -> None:
    """The answer of a steered model, read under the same steering, has the same states."""
    model = shared_backbone
    inputs = encoded(model, pictures, range(5), targets=False)
    plain = model.generate(inputs, 5, model.sites(["lm.block.1"]))
    with model.intervene(Steering(site, vector, alpha=4.0, positions=positions)):
        written = model.generate(inputs, 5, model.sites(["lm.norm"]))
        again = append_answers(inputs, written.token_map.answers, model.tokenizer.pad_token_id)
        read = model.read(again, model.sites(["lm.norm"]))
    if positions not in ("0", "3:70", "prompt", "image"):
        assert written.token_map.answers != plain.token_map.answers, "the steering is too weak for the test"
    for name in ("prompt", "answer"):
        first, second = (of.select(Selector.parse(name), model.vocabulary) for of in (written, read))
        assert (first.samples, first.positions) == (second.samples, second.positions)
        torch.testing.assert_close(first.states["lm.norm"], second.states["lm.norm"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("positions", ["all", "last_prompt", "answer", "66:", "image"])
def test_steered_answers_do_not_depend_on_the_batch(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor, positions: str
) -> None:
    model = shared_backbone
    with model.intervene(Steering("lm.block.0", vector, alpha=3.0, positions=positions)):
        together = model.generate(encoded(model, pictures, range(5), targets=False), 5).token_map.answers
        alone = [
            model.generate(encoded(model, pictures, [row], targets=False), 5).token_map.answers[0] for row in range(5)
        ]
    assert together == alone


def test_interventions_add_up_and_end_with_their_context(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor
) -> None:
    model = shared_backbone
    inputs = encoded(model, pictures, range(2), targets=True)
    here = model.sites(["lm.block.1"])
    plain = model.read(inputs, here).states["lm.block.1"]
    with model.intervene(Steering("lm.block.1", vector), Steering("lm.block.1", vector, alpha=-3.0, positions="image")):
        both = model.read(inputs, here)
    expected = torch.ones_like(plain[..., :1]).where((both.token_map.roles != Role.IMAGE)[..., None], -2.0)
    expected = expected * (both.token_map.roles != Role.PAD)[..., None] * vector
    torch.testing.assert_close(both.states["lm.block.1"] - plain, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.read(inputs, here).states["lm.block.1"], plain)


def hooks(model: VisionLanguageModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_gone_after_an_exception(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor
) -> None:
    model = shared_backbone
    inputs = encoded(model, pictures, range(2), targets=True)
    before = hooks(model)
    plain = model.read(inputs, model.sites(["lm.norm"])).states["lm.norm"]
    with pytest.raises(AssertionError), model.intervene(Steering("lm.block.1", vector)):
        assert hooks(model) != before + 1
    assert hooks(model) == before
    # In the middle of a pass, where capturing hooks hang on the model too.
    with (
        pytest.raises(ValueError, match="width"),
        model.intervene(Steering("lm.embed", vector), Steering("lm.block.1", torch.ones(63))),
    ):
        model.read(inputs, model.sites(["lm.*"]))
    assert hooks(model) == before
    # The first is fine, the second cannot even begin.
    with (
        pytest.raises(ValueError, match="not found"),
        model.intervene(Steering("lm.block.1", vector), Steering("nowhere", vector)),
    ):
        pass
    assert hooks(model) == before
    assert torch.equal(model.read(inputs, model.sites(["lm.norm"])).states["lm.norm"], plain)


@pytest.mark.parametrize("width", [1, 63, 65])
def test_a_vector_of_another_width(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], width: int
) -> None:
    model = shared_backbone
    message = rf"steering vector of width {width} at 'lm\.block\.1', where states have width 64"
    with pytest.raises(ValueError, match=message), model.intervene(Steering("lm.block.1", torch.ones(width))):
        model.generate(encoded(model, pictures, [0], targets=False), 2)


@pytest.mark.parametrize(
    ("site", "positions", "message"),
    [
        ("vision.block.0", "all", r"can be changed at sites of the language model only"),
        ("lm.block.9", "all", r"site 'lm\.block\.9' not found"),
        ("lm.block.*", "all", r"lm\.block\.\*"),
        ("lm.block.1", "answer_mean", r"known only after generation"),
        ("lm.block.1", "token_of_interest:dog", r"known only after generation"),
        ("lm.block.1", "-1", r"known only after generation"),
        ("lm.block.1", "everywhere", r"selector 'everywhere': expected one of"),
    ],
)
def test_what_cannot_be_steered(
    shared_backbone: VisionLanguageModel, vector: Tensor, site: str, positions: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message), shared_backbone.intervene(Steering(site, vector, 1.0, positions)):
        pass


def test_a_low_precision_model_is_steered_in_its_own(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor
) -> None:
    model = VisionLanguageModel.load(shared_backbone.source, dtype="bfloat16")
    inputs = encoded(model, pictures, range(3), targets=True)
    here = model.sites(["lm.block.1"])
    plain = model.read(inputs, here).states["lm.block.1"]
    with model.intervene(Steering("lm.block.1", vector, positions="text")):
        steered = model.read(inputs, here).states["lm.block.1"]
    assert steered.dtype == plain.dtype == torch.bfloat16
    assert not torch.equal(steered, plain)


# --- directional ablation -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors() -> Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def mask() -> Tensor:
    """For each sample its own positions, from the picture to the answer."""
    return torch.rand(5, 90, generator=torch.Generator().manual_seed(3)) < 0.4


def component(states: Tensor, vectors: Tensor) -> Tensor:
    """f·d̂ [B, T] of states [B, T, D] along vectors [B, D], as a share of ‖f‖."""
    along = (states.double() * vectors.double()[:, None]).sum(dim=-1) / vectors.double().norm(dim=-1)[:, None]
    share: Tensor = along / states.double().norm(dim=-1).clamp_min(1e-9)
    return share


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("positions", [*POSITIONS, "mask"])
def test_an_ablated_direction_is_gone_and_nothing_else(
    shared_backbone: VisionLanguageModel,
    pictures: list[Image.Image],
    vectors: Tensor,
    mask: Tensor,
    site: str,
    positions: str,
) -> None:
    model = shared_backbone
    inputs = encoded(model, pictures, range(5), targets=True)
    here = model.sites([site])
    plain = model.read(inputs, here)
    with model.intervene(ablation(site, 7 * vectors, mask if positions == "mask" else positions)):
        ablated = model.read(inputs, here).states[site]
    roles, states = plain.token_map.roles, plain.states[site]
    if positions == "mask":
        # Rows with answers are padded on the right, so that positions are columns.
        selected = mask[:, : roles.shape[1]] & ((roles == Role.IMAGE) if site == "projector" else (roles != Role.PAD))
    else:
        selected = _selected(site, positions, plain)
    if not selected.any():
        assert site == "projector"
        assert positions in _NO_IMAGES
        assert torch.equal(ablated, states)
        return
    assert (selected != (roles != Role.PAD)).any() == (positions != "all" or site == "projector")
    assert torch.equal(ablated[~selected], states[~selected])
    assert float(component(states, vectors)[selected].abs().max()) > 0.05
    assert float(component(ablated, vectors)[selected].abs().max()) < 1e-5
    # What is orthogonal to the direction stays: Pythagoras.
    left = states.norm(dim=-1) * (1 - component(states, vectors).square()).sqrt()
    torch.testing.assert_close(ablated.norm(dim=-1)[selected].double(), left[selected], rtol=1e-4, atol=1e-4)


def test_an_orthogonal_direction_removes_nothing(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vectors: Tensor
) -> None:
    """Neither one that no selected state has, nor the zero vector, nor one already removed."""
    model, site = shared_backbone, "lm.block.1"
    inputs = encoded(model, pictures, range(5), targets=True)
    here = model.sites([site, "lm.norm"])
    plain = model.read(inputs, here).states
    f = plain[site][:, 70]
    orthogonal = vectors - ((vectors * f).sum(dim=1) / f.square().sum(dim=1))[:, None] * f
    with model.intervene(ablation(site, orthogonal, "70")):
        ablated = model.read(inputs, here).states
    for name in plain:
        torch.testing.assert_close(ablated[name], plain[name], rtol=1e-4, atol=1e-4)
    with model.intervene(ablation(site, torch.zeros(64))):
        assert torch.equal(model.read(inputs, here).states["lm.norm"], plain["lm.norm"])
    once, twice = (ablation(site, vectors),), (ablation(site, vectors),) * 2
    results = []
    for interventions in (once, twice):
        with model.intervene(*interventions):
            results.append(model.read(inputs, here).states["lm.norm"])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_what_was_added_along_a_direction_goes_with_it(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor
) -> None:
    model, site = shared_backbone, "lm.block.1"
    inputs = encoded(model, pictures, range(3), targets=True)
    norm = model.sites(["lm.norm"])
    removed = ablation(site, vector, "text")
    with model.intervene(removed):
        alone = model.read(inputs, norm).states["lm.norm"]
    with model.intervene(Steering(site, vector, 3.0, "text"), removed):
        both = model.read(inputs, norm).states["lm.norm"]
    torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [ablation, Steering])
def test_each_sample_has_its_own_vector_and_positions(
    shared_backbone: VisionLanguageModel,
    pictures: list[Image.Image],
    vectors: Tensor,
    mask: Tensor,
    kind: Callable[..., Steering],
) -> None:
    """In one batch as one by one, whatever the padding; and written as read, through the cache."""
    model, site = shared_backbone, "lm.block.0"
    inputs = encoded(model, pictures, range(5), targets=False)
    plain = model.generate(inputs, 5).token_map.answers
    with model.intervene(kind(site, 4 * vectors, positions=mask)):
        written = model.generate(inputs, 5, model.sites(["lm.norm"]))
        again = append_answers(inputs, written.token_map.answers, model.tokenizer.pad_token_id)
        read = model.read(again, model.sites(["lm.norm"]))
    assert written.token_map.answers != plain, "the intervention is too weak for the test"
    for name in ("prompt", "answer"):
        first, second = (of.select(Selector.parse(name), model.vocabulary) for of in (written, read))
        torch.testing.assert_close(first.states["lm.norm"], second.states["lm.norm"], rtol=1e-3, atol=1e-3)
    for row in range(5):
        with model.intervene(kind(site, 4 * vectors[row], positions=mask[row : row + 1])):
            alone = model.generate(encoded(model, pictures, [row], targets=False), 5)
        assert alone.token_map.answers[0] == written.token_map.answers[row]


def test_a_mask_counts_without_padding(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vectors: Tensor
) -> None:
    """One position of each sample, among them generated ones, in prompts that are padded on the left."""
    model = shared_backbone
    inputs = encoded(model, pictures, range(5), targets=False)
    lengths = inputs["attention_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) > 2
    mask = torch.zeros(5, int(lengths.max()) + 2, dtype=torch.bool)
    mask[torch.arange(5), lengths + torch.tensor([-1, 0, -3, 1, -70])] = True
    here = model.sites(["lm.norm"])
    with model.intervene(ablation("lm.norm", vectors, mask)):
        ablated = model.generate(inputs, 5, here)
    gone = component(ablated.states["lm.norm"], vectors).abs() < 1e-6
    is_there = ablated.token_map.roles[:, : gone.shape[1]] != Role.PAD
    positions = torch.arange(gone.shape[1]) - ablated.token_map.first_column[:, None]
    for row in range(5):
        expected = mask[row].nonzero().flatten().tolist()
        assert positions[row][gone[row] & is_there[row]].tolist() == expected


def test_a_low_precision_model_is_ablated_in_its_own(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor
) -> None:
    model = VisionLanguageModel.load(shared_backbone.source, dtype="bfloat16")
    inputs = encoded(model, pictures, range(3), targets=True)
    here = model.sites(["lm.block.1"])
    with model.intervene(ablation("lm.block.1", vector)):
        ablated = model.read(inputs, here)
    states = ablated.states["lm.block.1"]
    assert states.dtype == torch.bfloat16
    left = component(states, vector.expand(3, 64))[ablated.token_map.roles != Role.PAD]
    assert float(left.abs().max()) < 4e-3  # rounding to 8 bits


@pytest.mark.parametrize(
    ("vector", "positions", "message"),
    [
        (torch.ones(3, 64), "all", "steering with 3 vectors for a batch of 2 samples"),
        (torch.ones(64), torch.ones(1, 80, dtype=torch.bool), "steering with 1 masks of positions for a batch of 2"),
        (torch.ones(2, 63), "all", r"steering vector of width 63 at 'lm\.block\.1', where states have width 64"),
        (torch.ones(64), "token_of_interest:dog", "known only after generation; give a role, a range, or a mask"),
    ],
)
def test_what_does_not_fit_the_batch(
    shared_backbone: VisionLanguageModel,
    pictures: list[Image.Image],
    vector: Tensor,
    positions: str | Tensor,
    message: str,
) -> None:
    model = shared_backbone
    before = hooks(model)
    with (
        pytest.raises(ValueError, match=message),
        model.intervene(ablation("lm.block.1", vector, positions)),
    ):
        model.read(encoded(model, pictures, range(2), targets=True))
    assert hooks(model) == before
