"""Steering beyond adding a vector: modes, schedules over the answer, conditions, prompts in the cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conceptshift.concepts import PCA, KMeans
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone import Condition, Generation, Selector, Steering
from conceptshift.lightning_modules.backbone.prompts import append_answers
from PIL import Image
from torch import Tensor

from .test_interventions import encoded, hooks


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
    with pytest.raises(
        ValueError, match=rf"positions '{width + 4}:' match nothing at 'lm.block.1': the prompt has {width} positions"
    ):
        model.try_steering(inputs, [Steering("lm.block.1", vector, 1.0, f"{width + 4}:")], 5)
    with pytest.raises(ValueError, match="width 63"):
        model.try_steering(inputs, [Steering("lm.block.1", torch.ones(63))], 5)
    assert hooks(model) == before


def test_a_threshold_is_of_the_absolute_activation(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor
) -> None:
    """Of a signed dictionary both ends pass."""
    model, site = shared_backbone, "lm.block.1"
    inputs = encoded(model, pictures, range(5), targets=False)
    generation = model.generate(inputs, 1, model.sites([site]))
    states = generation.select(Selector.parse("last_prompt"), model.vocabulary).states[site]
    dictionary = PCA(2).fit(states)
    V = dictionary.transform(states)[:, 0]
    assert (V > 0).any()
    assert (V < 0).any()
    threshold = float(V.abs().sort().values[2]) - 1e-4
    with model.intervene(Steering(site, vector, condition=Condition(dictionary, 0, threshold))) as (applied,):
        model.generate(inputs, 2)
    assert (applied.passed, applied.samples) == (3, 5)
    assert int((threshold < V).sum()) in (1, 2), "some of them are negative"


def test_samples_whose_concept_has_no_vector_do_not_count_as_steered(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor, clusters: tuple[KMeans, Tensor]
) -> None:
    model, (dictionary, assignment) = shared_backbone, clusters
    own = torch.zeros(3, 64)
    own[int(assignment[0])] = vector
    steering = Steering("lm.block.1", own, positions="answer", condition=Condition(dictionary))
    with model.intervene(steering) as (applied,):
        model.generate(encoded(model, pictures, range(5), targets=False), 2)
    assert (applied.passed, applied.samples) == (int((assignment == assignment[0]).sum()), 5)
    assert 0 < applied.passed < 5


@pytest.mark.parametrize("selector", ["last_prompt", "answer", "all"])
def test_logits_are_steered_alike_on_either_side_of_the_padding(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], vector: Tensor, selector: str
) -> None:
    """Of prompts without answers the last position is the last token, wherever it stands."""
    model = shared_backbone
    left = encoded(model, pictures, range(5), targets=False)
    lengths = left["attention_mask"].sum(dim=1).tolist()
    assert len(set(lengths)) > 2
    right = {name: value.clone() for name, value in left.items()}
    for row, length in enumerate(lengths):
        for name in ("input_ids", "attention_mask"):
            right[name][row] = left[name][row].roll(length, 0)
    with model.intervene(Steering("lm.block.1", 5 * vector, positions=selector)):
        one, other = model.logits(left), model.logits(right)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(one[row, -length:], other[row, :length], rtol=1e-3, atol=1e-3)
