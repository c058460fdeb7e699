"""What a pass returns: texts and states that depend on the sample only, and states that predict their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conceptshift.datamodules import CaptionDataModule, VQADataModule, read_image
from conceptshift.datamodules.sample import Sample
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone import Generation, Role, Selector
from torch import Tensor

SELECTORS = ("all", "prompt", "last_prompt", "image", "text", "answer", "answer_mean", "-1", "66:-2")


@pytest.fixture(scope="module")
def samples(shapes: Path) -> list[Sample]:
    """Captions and questions mixed, so that prompts differ in length."""
    captions, questions = CaptionDataModule(str(shapes), limit=9, predict_split="train"), VQADataModule(str(shapes))
    for data in (captions, questions):
        data.setup("predict")
    pairs = zip(captions.samples("predict"), questions.samples("predict"), strict=False)
    return [sample for pair in pairs for sample in pair][:11]


def encoded(model: VisionLanguageModel, samples: Sequence[Sample], targets: bool) -> dict[str, Tensor]:
    return model.encode(
        [read_image(sample.image) for sample in samples],
        [sample.prompt for sample in samples],
        [sample.target for sample in samples] if targets else None,
    )


def padded_left(inputs: dict[str, Tensor], pad: int) -> dict[str, Tensor]:
    """Move the padding of right-padded rows to the left, and add two columns more of it."""
    rows = {}
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    for name, value in inputs.items():
        rows[name] = value
        if value.shape == inputs["input_ids"].shape:
            fill = {"input_ids": pad, "labels": -100}.get(name, 0)
            moved = value.new_full((value.shape[0], value.shape[1] + 2), fill)
            for row, length in enumerate(lengths):
                moved[row, moved.shape[1] - length :] = value[row, :length]
            rows[name] = moved
    return rows


def run(
    model: VisionLanguageModel, samples: Sequence[Sample], batch_size: int, mode: str
) -> list[tuple[str, dict[str, list[tuple[int, str, Tensor]]]]]:
    """Text, and per selector (position, token, states at all sites), of each sample."""
    sites = model.sites(["projector", "lm.embed", "lm.block.1", "lm.norm"])
    results = []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        inputs = encoded(model, part, targets=mode != "generate")
        if mode.endswith("left"):
            inputs = padded_left(inputs, model.tokenizer.pad_token_id)
        done = model.generate(inputs, 6, sites) if mode.startswith("generate") else model.read(inputs, sites)
        results += _by_sample(done, model, len(part))
    return results


def _by_sample(
    done: Generation, model: VisionLanguageModel, count: int
) -> list[tuple[str, dict[str, list[tuple[int, str, Tensor]]]]]:
    selected: list[dict[str, list[tuple[int, str, Tensor]]]] = [{name: [] for name in SELECTORS} for _ in range(count)]
    for name in SELECTORS:
        rows = done.select(Selector.parse(name), model.vocabulary)
        states = torch.stack(list(rows.states.values()), dim=1)
        for sample, position, token, state in zip(rows.samples, rows.positions, rows.tokens, states, strict=True):
            selected[sample][name].append((position, token, state))
    return list(zip(done.texts, selected, strict=True))


@pytest.fixture(scope="module")
def alone(
    shared_backbone: VisionLanguageModel, samples: list[Sample]
) -> dict[str, list[tuple[str, dict[str, list[tuple[int, str, Tensor]]]]]]:
    """Every sample by itself, where nothing is padded."""
    return {mode: run(shared_backbone, samples, 1, mode) for mode in ("generate", "read")}


@pytest.mark.parametrize(
    "mode", ["generate", "generate with targets", "generate with targets left", "read", "read left"]
)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_texts_and_states_do_not_depend_on_batch_or_padding(
    shared_backbone: VisionLanguageModel,
    samples: list[Sample],
    alone: dict[str, list[tuple[str, dict[str, list[tuple[int, str, Tensor]]]]]],
    mode: str,
    batch_size: int,
) -> None:
    expected = alone[mode.split()[0]]
    found = run(shared_backbone, samples, batch_size, mode)
    assert [text for text, _ in found] == [text for text, _ in expected]
    for (_, ours), (_, reference) in zip(found, expected, strict=True):
        for name in SELECTORS:
            assert [row[:2] for row in ours[name]] == [row[:2] for row in reference[name]], name
            assert len(ours[name]) >= 1, name
            for (_, _, state), (_, _, wanted) in zip(ours[name], reference[name], strict=True):
                torch.testing.assert_close(state, wanted, rtol=1e-4, atol=1e-4)


def test_the_answers_of_the_fixture_differ_and_end_early(
    alone: dict[str, list[tuple[str, dict[str, list[tuple[int, str, Tensor]]]]]],
) -> None:
    """Otherwise the other tests would show little."""
    texts = [text for text, _ in alone["generate"]]
    assert len(set(texts)) >= 6
    assert len({len(rows["answer"]) for _, rows in alone["generate"]}) >= 3


def test_answers_are_what_transformers_generates(shared_backbone: VisionLanguageModel, samples: list[Sample]) -> None:
    model = shared_backbone
    together = model.generate(encoded(model, samples, targets=False), 6)
    for row, sample in enumerate(samples):
        inputs = encoded(model, [sample], targets=False)
        sequence = model.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist()
        assert together.token_map.answers[row] == sequence[inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("mode", ["generate", "read"])
def test_the_state_of_a_token_predicts_it(
    shared_backbone: VisionLanguageModel, samples: list[Sample], mode: str
) -> None:
    model = shared_backbone
    sites = model.sites(["lm.block.2"])
    inputs = encoded(model, samples, targets=mode == "read")
    done = model.generate(inputs, 6, sites) if mode == "generate" else model.read(inputs, sites)
    rows = done.select(Selector.parse("answer"), model.vocabulary)
    with torch.inference_mode():
        logits = model.unembed(model.final_norm(rows.states["lm.block.2"]))
    answers = [token for answer in done.token_map.answers for token in answer]
    assert rows.tokens == [model.vocabulary[token] for token in answers]
    if mode == "generate":
        assert logits.argmax(dim=1).tolist() == answers
    else:
        # The loss of the model itself is the mean over the same rows.
        with torch.inference_mode():
            loss = model(inputs).loss
        torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, torch.tensor(answers)), loss)


def test_a_generated_answer_read_back_has_the_same_states(
    shared_backbone: VisionLanguageModel, samples: list[Sample]
) -> None:
    model = shared_backbone
    sites = model.sites(["lm.block.2"])
    inputs = encoded(model, samples, targets=False)
    done = model.generate(inputs, 6, sites)
    from conceptshift.lightning_modules.backbone.prompts import append_answers

    again = model.read(append_answers(inputs, done.token_map.answers, model.tokenizer.pad_token_id), sites)
    assert again.texts == done.texts
    for name in (*SELECTORS, "token_class:colors", "token_class:places"):
        first, second = (of.select(Selector.parse(name), model.vocabulary) for of in (done, again))
        assert (first.samples, first.positions, first.tokens) == (second.samples, second.positions, second.tokens), name
        torch.testing.assert_close(first.states["lm.block.2"], second.states["lm.block.2"], rtol=1e-4, atol=1e-4)


def test_answer_mean_is_the_mean_before_the_end_of_sequence(
    shared_backbone: VisionLanguageModel, samples: list[Sample]
) -> None:
    model = shared_backbone
    done = model.generate(encoded(model, samples, targets=False), 6, model.sites(["lm.block.1"]))
    means = done.select(Selector.parse("answer_mean"), model.vocabulary)
    single = done.select(Selector.parse("answer"), model.vocabulary)
    end = model.tokenizer.eos_token_id
    for row, sample in enumerate(means.samples):
        counted = sum(token != end for token in done.token_map.answers[sample])
        first = single.samples.index(sample)
        expected = single.states["lm.block.1"][first : first + counted].mean(dim=0)
        torch.testing.assert_close(means.states["lm.block.1"][row], expected)
    ended = [answer for answer in done.token_map.answers if answer[-1] == end and len(answer) > 1]
    prompts = (done.token_map.answer_start - done.token_map.first_column).tolist()
    held = (done.token_map.roles != Role.PAD).sum(dim=1).tolist()
    assert held == [length + len(answer) for length, answer in zip(prompts, done.token_map.answers, strict=True)]
    assert ended, "no answer ended early"


def test_words_are_selected_where_they_are_said(shared_backbone: VisionLanguageModel, samples: list[Sample]) -> None:
    """The row of `token_of_interest` is the state that predicts the word's last sub-token, at its first mention."""
    model = shared_backbone
    done = model.read(encoded(model, samples, targets=True), model.sites(["lm.block.2"]))
    rows = done.select(Selector.parse("token_of_interest:In"), model.vocabulary)
    mentioned = [row for row, sample in enumerate(samples) if " in " in f" {sample.target} "]
    assert mentioned
    assert rows.samples == mentioned
    for position, sample in zip(rows.positions, rows.samples, strict=True):
        start = int(done.token_map.answer_start[sample] - done.token_map.first_column[sample])
        answer = done.token_map.answers[sample]
        said = model.tokenizer.decode(answer[: position + 1 - start + 1])
        before = model.tokenizer.decode(answer[: position + 1 - start])
        assert f"{said} ".count(" in ") == 1
        assert f"{before} ".count(" in ") == 0
