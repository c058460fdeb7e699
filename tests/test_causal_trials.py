"""Removing directions while a model reads: parity with one state at a time, and a concept whose effect is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.callbacks.parts.causal_trials import Case, Trials, removal_trials
from conceptshift.callbacks.parts.concept_states import ConceptStates
from conceptshift.callbacks.parts.word_probability import WordProbability
from conceptshift.datamodules.images import read_image
from conceptshift.datamodules.stored_features import FeatureStore
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone import Selector
from conceptshift.lightning_modules.backbone.readout import Readout
from torch import Tensor
from torch.nn.functional import normalize

Run = Callable[..., Any]


@pytest.fixture
def store(predict: Run, tmp_path: Path) -> FeatureStore:
    more = ("--model.selectors=['answer','answer_mean','last_prompt']", "--data.limit=12")
    done = predict(tmp_path / "store", *more, site="lm.*")
    assert done.status == 0, done.err
    return FeatureStore(tmp_path / "store")


@pytest.fixture
def readout(shared_backbone: VisionLanguageModel) -> Readout:
    return Readout.from_model(shared_backbone)


def cases_of(states: ConceptStates, rows: list[int], concepts: int) -> list[Case]:
    return [Case(at % concepts, row, states.ids[:row].count(states.ids[row])) for at, row in enumerate(rows)]


def by_hand(
    model: VisionLanguageModel, states: ConceptStates, case: Case, site: str, direction: Tensor | None, mean: bool
) -> Tensor:
    """Logits at the state of one case [positions, T], from a plain hook on one sample."""
    sample = states.samples[states.ids[case.row]]
    inputs = model.encode([read_image(Path(sample["image"]))], [sample["prompt"]], [sample["text"]])
    labels = inputs.pop("labels")[0]
    first = int((labels != -100).nonzero()[0]) - 1
    # An answer's states: those that predict its tokens; the last one, of the end of sequence, is in no mean.
    length = int((labels != -100).sum())
    at = slice(first, first + length - 1) if mean else slice(first + case.nth, first + case.nth + 1)
    (place,) = model.sites([site])

    def remove(module: Any, args: Any, output: Any) -> Any:
        state = (output[0] if isinstance(output, tuple) else output).clone()
        if direction is not None:
            for position in range(*at.indices(state.shape[1])):
                state[0, position] -= (state[0, position] @ direction) * direction
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handle = place.module.register_forward_hook(remove)
    with torch.inference_mode():
        logits: Tensor = model.model(**inputs).logits[0, at]
    handle.remove()
    return logits


def by_definition(logits: Tensor, words: list[str], vocabulary: list[str]) -> float:
    """Log of the summed probability of words that are one token each, averaged over positions."""
    tokens = [token for token, text in enumerate(vocabulary) if text.strip().lower() in words]
    return float(logits.double().softmax(dim=-1)[:, tokens].sum(dim=1).log().mean())


WORDS = [["heart", "star", "picture"], ["moon"]]


@pytest.mark.parametrize(
    ("site", "selector"),
    [
        ("lm.block.0", "answer"),
        ("lm.block.2", "answer_mean"),
        ("lm.norm", "last_prompt"),
        ("lm.block.0", "answer_mean"),
    ],
)
def test_trials_are_those_of_one_state_at_a_time(
    shared_backbone: VisionLanguageModel, store: FeatureStore, readout: Readout, site: str, selector: str
) -> None:
    model, is_mean = shared_backbone, selector == "answer_mean"
    states = ConceptStates.read(store, site, selector, "original")
    cases = cases_of(states, list(range(0, len(states.ids), 2))[:6], 2)
    directions = normalize(torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    trials = removal_trials(
        model, states, site, Selector.parse(selector), cases, directions, WordProbability(WORDS, readout), batch_size=4
    )
    assert trials.same.all()
    for number, case in enumerate(cases):
        words = WORDS[case.concept]
        before = by_definition(by_hand(model, states, case, site, None, is_mean), words, readout.vocabulary)
        assert float(trials.before[number]) == pytest.approx(before, abs=1e-3)
        for fall, direction in zip(trials.falls[number].tolist(), directions[case.concept], strict=True):
            after = by_definition(by_hand(model, states, case, site, direction, is_mean), words, readout.vocabulary)
            assert fall == pytest.approx(before - after, abs=1e-3)
    assert float(trials.falls.abs().max()) > 0.05


def run(
    model: VisionLanguageModel,
    states: ConceptStates,
    cases: list[Case],
    directions: Tensor,
    readout: Readout,
    size: int,
) -> Trials:
    probability = WordProbability(WORDS, readout)
    return removal_trials(
        model, states, "lm.block.1", Selector.parse("answer"), cases, directions, probability, batch_size=size
    )


def test_trials_do_not_depend_on_the_batch_or_order(
    shared_backbone: VisionLanguageModel, store: FeatureStore, readout: Readout
) -> None:
    states = ConceptStates.read(store, "lm.block.1", "answer", "original")
    cases = cases_of(states, list(range(10)), 2)
    directions = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(0))
    together = run(shared_backbone, states, cases, directions, readout, 32)
    for size in (1, 3):
        torch.testing.assert_close(
            run(shared_backbone, states, cases, directions, readout, size).falls, together.falls, rtol=1e-3, atol=1e-4
        )
    backwards = run(shared_backbone, states, cases[::-1], directions, readout, 3)
    torch.testing.assert_close(backwards.falls.flip(0), together.falls, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(backwards.before.flip(0), together.before, rtol=1e-3, atol=1e-4)


def test_states_that_are_not_read_again_are_known(
    shared_backbone: VisionLanguageModel, store: FeatureStore, readout: Readout
) -> None:
    """Another state, an answer that is too short for it, and the zero vector, which changes nothing."""
    states = ConceptStates.read(store, "lm.block.1", "answer", "original")
    cases = cases_of(states, [0, 4, 8, 12], 2)
    changed = states.states.clone()
    changed[4] += states.states.std(dim=0).norm()
    samples = {**states.samples}
    gone = states.ids[12]
    samples[gone] = {**samples[gone], "text": ""}
    cases[3] = replace(cases[3], nth=3)
    damaged = replace(states, samples=samples)
    vars(damaged)["states"] = changed
    trials = run(shared_backbone, damaged, cases, torch.zeros(2, 1, 64), readout, 32)
    assert trials.same.tolist() == [True, False, True, False]
    assert trials.before.isfinite().all()
    assert (trials.falls == 0).all()


def test_a_planted_concept_falls_and_chance_does_not(
    shared_backbone: VisionLanguageModel, store: FeatureStore, readout: Readout
) -> None:
    """At `lm.norm`, a concept that is a token's row of the unembedding: without it, the token's logit is 0."""
    states = ConceptStates.read(store, "lm.norm", "answer", "original")
    logits = states.states @ readout.unembedding.float().T
    written = {text.strip().lower() for text in readout.vocabulary}
    rows = [
        row
        for row in range(len(states.ids))
        if len(word := readout.vocabulary[int(logits[row].argmax())].strip().lower()) > 3 and word in written
    ][:8]
    assert len(rows) >= 5
    tokens = [int(logits[row].argmax()) for row in rows]
    words = [[readout.vocabulary[token].strip().lower()] for token in tokens]
    planted = readout.unembedding[tokens].float()[:, None]
    chance = torch.randn(len(rows), 20, 64, generator=torch.Generator().manual_seed(0))
    cases = [Case(at, row, states.ids[:row].count(states.ids[row])) for at, row in enumerate(rows)]
    trials = removal_trials(
        shared_backbone,
        states,
        "lm.norm",
        Selector.parse("answer"),
        cases,
        torch.cat([planted, chance], dim=1),
        WordProbability(words, readout),
    )
    assert trials.same.all()
    for number, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        d = normalize(readout.unembedding[token].float(), dim=0)
        left = (states.states[row] - (states.states[row] @ d) * d) @ readout.unembedding.float().T
        assert float(left[token]) == pytest.approx(0, abs=1e-3)
        after = by_definition(left[None], words[number], readout.vocabulary)
        assert float(trials.before[number] - trials.falls[number, 0]) == pytest.approx(after, abs=1e-3)
    falls, null = trials.falls[:, 0], trials.falls[:, 1:]
    assert (falls > 0).all()
    assert (falls > 2 * null.max(dim=1).values).all()
    assert (falls > 10 * null.mean(dim=1).abs()).all()


# --- the probability of words ---------------------------------------------------------------------------


def small_readout() -> Readout:
    vocabulary = [" star", "Star", " surf", "board", " dog", "x"]
    return Readout(torch.eye(6), vocabulary, {"surfboard": [[2, 3]], "star": [[5, 5]]}, None, "")


def test_words_are_counted_with_all_their_tokens() -> None:
    """A word's own tokens where it has any, else its sub-tokens; each token once."""
    p = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.25, 0.05]])
    probability = WordProbability(
        [["star"], ["surfboard", "dog"], [], ["dog"], ["board", "surfboard"]], small_readout()
    )
    for concept, expected in ((0, 0.3), (1, 0.65), (3, 0.25), (4, 0.4)):
        assert float(probability(p.log() + 7, torch.tensor([concept])).exp()) == pytest.approx(expected, rel=1e-5)
    both = probability(p.log().expand(2, 6), torch.tensor([3, 0]))
    assert both.exp().tolist() == pytest.approx([0.25, 0.3], rel=1e-5)


def test_words_that_the_model_rules_out_are_finite() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, -1e4, 0.0]])
    assert float(WordProbability([["dog"]], small_readout())(logits, torch.tensor([0]))) == pytest.approx(-1e4, abs=3)


def test_a_word_that_the_model_cannot_write() -> None:
    with pytest.raises(ValueError, match=r"no token for 'zebra'; ground the concepts with this model"):
        WordProbability([["zebra"]], small_readout())
