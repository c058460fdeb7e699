"""Steering and ablation.

α = 0 changes nothing, an ablated direction is gone, only the selected positions change, nothing outlives its context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conceptshift.concepts import KMeans
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone import Condition, Generation, Role, Selector, Steering
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


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (len(PROMPTS), 8, 8, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(one.numpy()).resize((64, 64), Image.Resampling.NEAREST) for one in noise]


@pytest.fixture(scope="module")
def vector() -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(1))


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
    # The projector has states at visual tokens only.
    selector = Selector.parse("image" if site == "projector" else positions)
    selected = selector.mask(plain.token_map, 0, change.shape[1])
    assert selected.any()
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
        ("vision.block.0", "all", r"steering works on sites of the language model"),
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
        selector = Selector.parse("image" if site == "projector" else positions)
        selected = selector.mask(plain.token_map, 0, roles.shape[1])
    assert selected.any()
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


# --- modes, schedules, conditions -------------------------------------------------------------------------


def expected(mode: str, f: Tensor, s: Tensor) -> Tensor:
    """f′ of states [..., D], in float64, straight from the definition."""
    f, s = f.double(), s.double()
    direction = s / s.norm()
    along = (f @ direction)[..., None]
    meant: dict[str, Tensor] = {
        "add": f + s,
        "project_away": f - along * direction,
        "replace": s.expand_as(f),
        "clamp": f + (s.norm() - along) * direction,
    }
    return meant[mode]


@pytest.mark.parametrize("mode", ["add", "project_away", "replace", "clamp"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, -2.0])
def test_a_mode_goes_from_the_state_towards_what_it_means(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor, mode: str, alpha: float
) -> None:
    model, site = shared_backbone, "lm.block.1"
    inputs = encoded(model, pictures, range(5), targets=True)
    here = model.sites([site])
    plain = model.read(inputs, here)
    with model.intervene(Steering(site, 5 * vector, alpha, "text", mode=mode)):  # type: ignore[arg-type]
        steered = model.read(inputs, here).states[site]
    selected = Selector.parse("text").mask(plain.token_map, 0, steered.shape[1])
    f = plain.states[site]
    target = f.double() + alpha * (expected(mode, f, 5 * vector) - f.double())
    torch.testing.assert_close(steered[selected].double(), target[selected], rtol=1e-5, atol=1e-4)
    assert torch.equal(steered[~selected], f[~selected])
    if alpha == 0:
        assert torch.equal(steered, f)
    else:
        assert not torch.allclose(steered[selected], f[selected], atol=1e-3)


@pytest.mark.parametrize("mode", ["add", "project_away", "replace", "clamp"])
def test_a_schedule_gives_each_answer_token_its_strength(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor, mode: str
) -> None:
    """State by state what a constant α gives there; written as read, with the last value to the end."""
    model, site = shared_backbone, "lm.norm"  # nothing after it, so that each position stands alone
    inputs = encoded(model, pictures, range(5), targets=False)
    here = model.sites([site])
    schedule = [0.5, 0.0, 2.0]

    def written(alpha: float | list[float]) -> Generation:
        with model.intervene(Steering(site, vector, alpha, mode=mode)):  # type: ignore[arg-type]
            return model.generate(inputs, 5, here)

    scheduled = written(schedule)
    read_inputs = append_answers(inputs, scheduled.token_map.answers, model.tokenizer.pad_token_id)
    constant = {}
    for alpha in schedule:
        with model.intervene(Steering(site, vector, alpha, mode=mode)):  # type: ignore[arg-type]
            constant[alpha] = model.read(read_inputs, here)
    with model.intervene(Steering(site, vector, schedule, mode=mode)):  # type: ignore[arg-type]
        read = model.read(read_inputs, here)
    lengths = []
    for row, answer in enumerate(read.token_map.answers):
        start = int(read.token_map.answer_start[row]) - 1
        lengths.append(len(answer))
        for step in range(len(answer)):
            alpha = schedule[min(step, 2)]
            states = [one.states[site][row, start + step] for one in (read, constant[alpha])]
            torch.testing.assert_close(states[0], states[1])
        torch.testing.assert_close(read.states[site][row, 3], constant[0.5].states[site][row, 3])
    assert max(lengths) > 3
    first, second = (of.select(Selector.parse("answer"), model.vocabulary) for of in (scheduled, read))
    torch.testing.assert_close(first.states[site], second.states[site], rtol=1e-3, atol=1e-3)


def test_a_schedule_may_also_end_in_nothing(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor
) -> None:
    """[α, 0] over the answer is α at the last position of the prompt."""
    model = shared_backbone
    inputs = encoded(model, pictures, range(5), targets=False)
    answers = []
    for steering in (
        Steering("lm.block.1", vector, [4.0, 0.0], "answer"),
        Steering("lm.block.1", vector, 4.0, "last_prompt"),
    ):
        with model.intervene(steering):
            answers.append(model.generate(inputs, 5).token_map.answers)
    assert answers[0] == answers[1] != model.generate(inputs, 5).token_map.answers


def test_generated_and_prompt_are_all(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor
) -> None:
    model, site = shared_backbone, "lm.block.1"
    inputs = encoded(model, pictures, range(5), targets=False)
    here = model.sites(["lm.norm"])
    both = (Steering(site, vector, 3.0, "prompt"), Steering(site, vector, 3.0, "generated"))
    results = []
    for steering in ((Steering(site, vector, 3.0, "all"),), both, both[::-1], both[:1]):
        with model.intervene(*steering):
            results.append(model.generate(inputs, 5, here))
    assert results[0].texts == results[1].texts == results[2].texts
    torch.testing.assert_close(results[0].states["lm.norm"], results[1].states["lm.norm"])
    assert results[3].texts != results[0].texts


def test_several_at_one_site_in_their_order(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor
) -> None:
    model, site = shared_backbone, "lm.block.1"
    inputs = encoded(model, pictures, range(3), targets=True)
    here = model.sites([site])
    add, clear = Steering(site, 3 * vector), Steering(site, vector, mode="project_away")
    with model.intervene(clear, add):
        added_last = model.read(inputs, here).states[site][:, 70:75]
    with model.intervene(add, clear):
        cleared_last = model.read(inputs, here).states[site][:, 70:75]
    along = vector / vector.norm()
    torch.testing.assert_close(added_last @ along, (3 * vector.norm()).expand(3, 5), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(cleared_last @ along, torch.zeros(3, 5), rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def clusters(shared_backbone: VisionLanguageModel, pictures: list[Image.Image]) -> tuple[KMeans, Tensor]:
    """Three clusters of the last prompt states of five samples at block 1, and the cluster of each sample."""
    inputs = encoded(shared_backbone, pictures, range(5), targets=False)
    generation = shared_backbone.generate(inputs, 2, shared_backbone.sites(["lm.block.1"]))
    states = generation.select(Selector.parse("last_prompt"), shared_backbone.vocabulary).states["lm.block.1"]
    dictionary = KMeans(3, seed=0).fit(states)
    assignment = dictionary.assign(states)
    assert len(set(assignment.tolist())) == 3
    return dictionary, assignment


@pytest.mark.parametrize("selector", ["all", "answer", "generated"])
def test_only_samples_of_a_concept_are_steered(
    shared_backbone: VisionLanguageModel,
    pictures: list[Image.Image],
    vector: Tensor,
    clusters: tuple[KMeans, Tensor],
    selector: str,
) -> None:
    """By the strongest concept, by a threshold, and with a vector for each concept; in any company, read or written."""
    model, site = shared_backbone, "lm.block.1"
    dictionary, assignment = clusters
    inputs = encoded(model, pictures, range(5), targets=False)
    chosen = int(assignment[0])
    inside = assignment == chosen
    own = torch.zeros(3, 64)
    own[chosen] = 4 * vector
    states = model.read(encoded(model, pictures, range(5), targets=True), model.sites([site]))
    last = states.select(Selector.parse("last_prompt"), model.vocabulary).states[site]
    between = dictionary.transform(last)[:, chosen].sort().values
    count = int(inside.sum())
    threshold = float((between[-count] + between[-count - 1]) / 2)
    gate = partial(Steering, site, positions=selector)
    ways = {
        "strongest": gate(4 * vector, condition=Condition(dictionary, chosen)),
        "threshold": gate(4 * vector, condition=Condition(dictionary, chosen, threshold)),
        "by concept": gate(own, condition=Condition(dictionary)),
        "by mask": gate(4 * vector * inside[:, None]),
    }
    plain = model.generate(inputs, 5)
    written = {}
    for name, steering in ways.items():
        with model.intervene(steering):
            written[name] = model.generate(inputs, 5).token_map.answers
            single = model.generate(encoded(model, pictures, [0], targets=False), 5) if name != "by mask" else None
        assert single is None or single.token_map.answers[0] == written[name][0]
    for name in ways:
        assert written[name] == written["by mask"], name
    changed = [one != other for one, other in zip(written["strongest"], plain.token_map.answers, strict=True)]
    assert any(changed)
    assert not any(moved for moved, one in zip(changed, inside.tolist(), strict=True) if not one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": float("nan")}, "`alpha` must be a finite number"),
        ({"alpha": [1.0, float("inf")]}, "`alpha` must be a finite number"),
        ({"alpha": []}, "`alpha` must be a finite number, or a list of at least one"),
        ({"mode": "multiply"}, "`mode` must be one of add, project_away, replace, clamp, got 'multiply'"),
        ({"vector": torch.full((64,), float("nan"))}, r"the steering vector for 'lm\.block\.1' is not finite"),
        ({"positions": "token_class:colors"}, "known only after generation"),
    ],
)
def test_what_no_model_could_be_steered_with(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Steering(**{"site": "lm.block.1", "vector": torch.ones(64), **options})


def test_a_condition_that_is_none(clusters: tuple[KMeans, Tensor]) -> None:
    with pytest.raises(ValueError, match="`concept` must be one of 0 … 2 of the dictionary, got 3"):
        Condition(clusters[0], 3)
    with pytest.raises(ValueError, match="`threshold` needs the `concept`"):
        Condition(clusters[0], threshold=0.5)


# --- prompts in the cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["answer", "last_prompt", "generated"])
@pytest.mark.parametrize("site", ["lm.embed", "lm.block.0", "lm.norm"])
def test_a_prompt_in_the_cache_gives_the_same(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor, site: str, selector: str
) -> None:
    """For any number of generations from it, and for each sample's own padding."""
    model = shared_backbone
    inputs = encoded(model, pictures, range(5), targets=False)
    prefilled = model.prefill(inputs)
    plain = model.generate(inputs, 5)
    for alpha in (0.0, 5.0, -5.0, 0.0):
        with model.intervene(Steering(site, vector, alpha, selector)):
            whole, cached = model.generate(inputs, 5), model.generate(prefilled, 5)
        assert cached.token_map.answers == whole.token_map.answers
        assert (cached.texts == plain.texts) == (alpha == 0)


def test_a_selector_that_matches_nothing_is_told_at_once(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor
) -> None:
    model = shared_backbone
    before = hooks(model)
    inputs = encoded(model, pictures, [0], targets=False)
    width = inputs["input_ids"].shape[1]
    model.try_steering(inputs, [Steering("lm.block.1", vector, 1.0, f"{width + 3}:")], 5)
    with pytest.raises(ValueError, match=rf"positions '{width + 4}:' match nothing: the prompt has {width} positions"):
        model.try_steering(inputs, [Steering("lm.block.1", vector, 1.0, f"{width + 4}:")], 5)
    with pytest.raises(ValueError, match="width 63"):
        model.try_steering(inputs, [Steering("lm.block.1", torch.ones(63))], 5)
    assert hooks(model) == before
