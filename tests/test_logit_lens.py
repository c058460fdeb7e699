"""The logit lens: every layer and position decodes to what softmax(unembedding(norm(h))) of its state says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone import Generation, Role, Steering, logit_lens
from conceptshift.lightning_modules.backbone.logit_lens import LensQuery, LensReading
from conceptshift.tests.families.crops import CROPS
from conceptshift.tests.families.dynamic import DYNAMIC, ODD
from conceptshift.tests.test_generation import padded_left
from PIL import Image
from torch import Tensor

PROMPTS = ["Where is this?", "How many shapes are there in this picture?", "What?", "Is the circle red?", "Who?"]
LAYERS = ("lm.embed", "lm.block.0", "lm.block.1", "lm.block.2")
ASKED = (7, 90, 301)
QUERY = LensQuery(LAYERS, top_k=4, tokens=ASKED)
TOKENS = 20
# Besides, of the odd ones, those whose answers are not forced to begin or end with certain tokens.
FAMILIES = {**CROPS, **DYNAMIC, "blip": ODD["blip"], "t5gemma2": ODD["t5gemma2"]}


def encoded(model: VisionLanguageModel, pictures: Sequence[Image.Image], rows: Sequence[int]) -> dict[str, Tensor]:
    return model.encode([pictures[row] for row in rows], [PROMPTS[row] for row in rows])


def read(done: Generation) -> LensReading:
    assert done.lens is not None
    return done.lens


def of_sample(reading: LensReading, sample: int) -> dict[str, Tensor]:
    """What one sample's positions decode to."""
    here = reading.samples == sample
    names = ("positions", "token_ids", "roles", "image_index", "token_probabilities")
    values = ("top_ids", "top_probabilities")
    rows: dict[str, Tensor] = {name: getattr(reading, name)[here] for name in names}
    return rows | {name: getattr(reading, name)[:, here] for name in values}


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal, but for tokens that are about as probable as others."""
    for name in ("positions", "token_ids", "roles", "image_index"):
        assert torch.equal(one[name], other[name]), name
    for name in ("top_probabilities", "token_probabilities"):
        torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=0)
    differs = one["top_ids"] != other["top_ids"]
    values = one["top_probabilities"]
    gaps = (values[..., :-1] - values[..., 1:]).abs()
    edge = values.new_zeros(*values.shape[:-1], 1)  # beyond the last one of the list, nobody knows
    apart = torch.minimum(torch.cat([edge + 1, gaps], dim=-1), torch.cat([gaps, edge], dim=-1)) > 2 * tolerance
    assert not (differs & apart).any()


def decoded(logits: Tensor) -> dict[str, Tensor]:
    """The same of logits [L, N, tokens], in float64."""
    probabilities = logits.double().softmax(dim=-1).float()
    top = probabilities.topk(QUERY.top_k)
    return {
        "top_ids": top.indices,
        "top_probabilities": top.values,
        "token_probabilities": probabilities[..., list(ASKED)].amax(dim=0),
    }


def hidden_states(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Hidden states of transformers' own [positions, D], of which the last one has gone through the final norm."""
    with torch.no_grad():
        states: tuple[Tensor, ...] = model(**inputs, output_hidden_states=True).hidden_states
    return [state[0].double() for state in states]


def normed(state: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight.double() * state / (state.square().mean(dim=-1, keepdim=True) + eps).sqrt()


@pytest.fixture(scope="module")
def generation(shared_backbone: VisionLanguageModel, pictures: list[Image.Image]) -> Generation:
    done = shared_backbone.generate(encoded(shared_backbone, pictures, range(5)), TOKENS, lens=QUERY)
    assert len({len(answer) for answer in done.token_map.answers}) > 2, "answers of different lengths are wanted"
    return done


def test_every_layer_and_position_is_what_transformers_hidden_states_say(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], generation: Generation
) -> None:
    """Each sample alone, prompt and answer read at once without a cache, the norm written out."""
    model = shared_backbone
    for row, answer in enumerate(generation.token_map.answers):
        inputs = encoded(model, pictures, [row])
        answered = torch.cat([inputs["input_ids"], torch.tensor([answer[:-1]], dtype=torch.long)], dim=1)
        inputs |= {"input_ids": answered, "attention_mask": torch.ones_like(answered)}
        states = hidden_states(model.model, inputs)
        norm, head = model.model.model.language_model.norm, model.model.lm_head.weight.double()
        finals = [normed(state, norm.weight, norm.variance_epsilon) for state in states[:-1]] + [states[-1]]
        is_image = torch.eq(answered[0], model.encode.image_token_id or 0)
        expected = decoded(torch.stack([state @ head.T for state in finals])) | {
            "positions": torch.arange(answered.shape[1]),
            "token_ids": answered[0],
            "image_index": torch.where(is_image, is_image.cumsum(0) - 1, -1),
        }
        found = of_sample(read(generation), row)
        assert found["token_probabilities"].std() > 0
        assert torch.equal(found["roles"] == Role.IMAGE, is_image)
        assert_alike(found, expected | {"roles": found["roles"]})


def test_the_last_layer_decodes_to_what_was_answered(generation: Generation) -> None:
    for row, answer in enumerate(generation.token_map.answers):
        found = of_sample(read(generation), row)
        assert found["top_ids"][-1, -len(answer) :, 0].tolist() == answer
        assert (found["roles"] == Role.ANSWER).sum() == len(answer) - 1


def test_probabilities_are_sorted_and_no_more_than_one(generation: Generation) -> None:
    values = read(generation).top_probabilities
    assert values.dtype == torch.float32
    assert (values.diff(dim=-1) <= 0).all()
    assert (values > 0).all()
    assert (values.sum(dim=-1) <= 1 + 1e-6).all()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_batch_decodes_as_its_samples_alone(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], generation: Generation, padding: str
) -> None:
    model = shared_backbone
    inputs = model.encode(pictures, PROMPTS, ["red", "a blue circle", "no", "a", "on the beach"])
    if padding == "left":
        inputs = padded_left(inputs, model.tokenizer.pad_token_id)
    together = read(model.generate(inputs, TOKENS, lens=QUERY))
    for row in range(5):
        alone = read(model.generate(encoded(model, pictures, [row]), TOKENS, lens=QUERY))
        assert_alike(of_sample(together, row), of_sample(alone, 0))


@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_the_size_of_chunks_changes_nothing(
    shared_backbone: VisionLanguageModel,
    pictures: list[Image.Image],
    generation: Generation,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
) -> None:
    """And bounds what is decoded at a time."""
    model, sizes = shared_backbone, []
    head = model.model.lm_head
    forward = head.forward

    def counted(states: Tensor) -> Tensor:
        sizes.append(len(states))
        logits: Tensor = forward(states)
        return logits

    monkeypatch.setattr(logit_lens, "_CHUNK", 8 * len(head.weight) * rows)
    inputs = encoded(model, pictures, range(5))
    monkeypatch.setattr(head, "forward", counted)
    reader = model._lens_reader(QUERY)
    monkeypatch.setattr(head, "forward", forward)
    monkeypatch.setattr(model, "_lens_reader", lambda lens: reader)
    found = read(model.generate(inputs, TOKENS, lens=QUERY))
    for row in range(5):
        assert_alike(of_sample(found, row), of_sample(read(generation), row))
    assert max(sizes) <= rows
    # Chunks are full whatever layers and passes their rows are of.
    assert len(set(sizes[:-1])) <= 1
    assert sum(sizes) >= found.top_ids.shape[0] * found.top_ids.shape[1]


def test_visual_tokens_alone(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], generation: Generation
) -> None:
    query = LensQuery(LAYERS[1:3], top_k=4, tokens=ASKED, positions="image")
    found = read(shared_backbone.generate(encoded(shared_backbone, pictures, range(5)), 2, lens=query))
    every = read(generation)
    image = every.roles == Role.IMAGE
    assert found.layers == LAYERS[1:3]
    assert found.image_index.tolist() == [*range(64)] * 5
    assert torch.equal(found.samples, every.samples[image])
    torch.testing.assert_close(found.top_probabilities, every.top_probabilities[1:3, image])
    alone = [replace(query, layers=(layer,)) for layer in found.layers]
    of_layers = [shared_backbone.generate(encoded(shared_backbone, pictures, range(5)), 2, lens=one) for one in alone]
    largest = torch.stack([read(one).token_probabilities for one in of_layers]).amax(dim=0)
    torch.testing.assert_close(found.token_probabilities, largest)
    assert not torch.allclose(largest, read(of_layers[0]).token_probabilities)


@pytest.mark.parametrize("site", ["projector", "lm.embed", "lm.block.1"])
def test_what_is_steered_is_what_is_read(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], generation: Generation, vector: Tensor, site: str
) -> None:
    """The layer itself, those behind it, and none before it; as the captured states say."""
    model = shared_backbone
    sites = model.sites(LAYERS)
    with model.intervene(Steering(site, vector, alpha=4.0, positions="image")):
        done = model.generate(encoded(model, pictures, range(5)), 4, sites, lens=QUERY)
    before = {"projector": 0, "lm.embed": 0, "lm.block.1": 2}[site]
    for row in range(5):
        found, plain = of_sample(read(done), row), of_sample(read(generation), row)
        first = int(done.token_map.first_column[row])
        columns = first + found["positions"]
        states = torch.stack([done.states[name][row, columns] for name in LAYERS])
        with torch.inference_mode():
            assert_alike(found, found | decoded(model.unembed(model.final_norm(states))))
        image = found["roles"] == Role.IMAGE
        there = image.nonzero().flatten()
        changes = (found["top_probabilities"][:, there] - plain["top_probabilities"][:, there]).abs().amax(dim=(1, 2))
        assert (changes[:before] < 1e-6).all()
        assert (changes[before:] > 1e-3).all()


def test_in_half_precision(backbone: VisionLanguageModel, pictures: list[Image.Image]) -> None:
    """Logits as the model makes them in its precision; probabilities from them in float32."""
    backbone.to(torch.bfloat16)
    sites = backbone.sites(LAYERS)
    done = backbone.generate(encoded(backbone, pictures, range(3)), 4, sites, lens=QUERY)
    for row in range(3):
        found = of_sample(read(done), row)
        states = torch.stack(
            [done.states[name][row, done.token_map.first_column[row] + found["positions"]] for name in LAYERS]
        )
        with torch.inference_mode():
            logits = backbone.unembed(backbone.final_norm(states))
        assert logits.dtype == torch.bfloat16
        # A chunk's rows are not summed in the same order: a logit is off by a rounding at most.
        assert_alike(found, found | decoded(logits), tolerance=4e-3)
        assert found["top_ids"][-1, -len(done.token_map.answers[row]), 0] == done.token_map.answers[row][0]


def test_logits_are_capped_as_the_model_caps_them(pictures: list[Image.Image]) -> None:
    """With an unembedding that reaches the cap of 30, the last layer says what the model itself does."""
    model = VisionLanguageModel(*CROPS["paligemma"](), "paligemma")
    with torch.no_grad():
        model.unembed.weight.mul_(10)
    inputs = encoded(model, pictures, [0])
    found = read(model.generate(inputs, 1, lens=LensQuery(("lm.block.2",), 1, tuple(range(len(model.unembed.weight))))))
    logits = model.logits(inputs)[0, found.positions].double()
    assert 15 < logits.abs().max() <= 30
    torch.testing.assert_close(found.token_probabilities, logits.softmax(dim=-1).float(), atol=1e-5, rtol=0)


def test_of_equally_probable_tokens_the_first_is_kept(
    backbone: VisionLanguageModel, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As greedy decoding does, however many are kept: half precision knows few values."""
    backbone.to(torch.bfloat16)
    head, generator = backbone.model.lm_head, torch.Generator().manual_seed(0)
    table = torch.randint(4, (97, len(head.weight)), generator=generator).to(torch.bfloat16)

    def rows_of(states: Tensor) -> Tensor:
        return states.float().abs().sum(dim=-1).mul(1000).long() % len(table)

    monkeypatch.setattr(head, "forward", lambda states: table[rows_of(states)])
    inputs = encoded(backbone, pictures, range(2))
    one, five = (read(backbone.generate(inputs, 2, lens=LensQuery(LAYERS, top_k))) for top_k in (1, 5))
    done = backbone.generate(inputs, 2, backbone.sites(LAYERS))
    columns = done.token_map.first_column[one.samples] + one.positions
    states = torch.stack([done.states[layer][one.samples, columns] for layer in LAYERS])
    logits = table[rows_of(backbone.final_norm(states))]
    first = (logits == 3).to(torch.uint8).argmax(dim=-1)
    assert len({*first.flatten().tolist()}) > 5
    assert torch.equal(one.top_ids[..., 0], first)
    assert torch.equal(five.top_ids[..., 0], first)
    # Those that follow are as probable, and others.
    assert (logits.gather(-1, five.top_ids) == 3).all()
    assert (five.top_ids.sort(dim=-1).values.diff(dim=-1) > 0).all()


def test_what_is_read_or_steered_at_the_final_norm_is_the_models_own(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], generation: Generation, vector: Tensor
) -> None:
    model = shared_backbone
    inputs = encoded(model, pictures, range(5))
    sites, steering = model.sites(["lm.norm", "lm_head"]), Steering("lm.norm", vector, alpha=0.5)
    with model.intervene(steering):
        plain = model.generate(inputs, TOKENS, sites[:1])
        looked = model.generate(inputs, TOKENS, sites[:1], lens=QUERY)
    assert looked.texts == plain.texts
    assert torch.equal(looked.states["lm.norm"], plain.states["lm.norm"])
    # The lens reads with the final norm as it is, so that up to the last layer nothing has changed.
    for row in range(5):
        one, other = of_sample(read(looked), row), of_sample(read(generation), row)
        prompt = one["roles"] != Role.ANSWER
        assert torch.equal(one["top_ids"][:, prompt], other["top_ids"][:, other["roles"] != Role.ANSWER])


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_many_families(family: str) -> None:
    """Several tiles, pictures of different shapes; a decoder whose sequence is the answer; pictures beside the text."""
    model = VisionLanguageModel(*FAMILIES[family](), family)
    noise = torch.randint(256, (2, 6, 6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = [Image.fromarray(one.numpy()).resize(size) for one, size in zip(noise, [(90, 60), (64, 128)], strict=True)]
    names = tuple(site.name for site in model.sites(["lm.embed", "lm.block.*"]))
    done = model.generate(model.encode(images, PROMPTS[:2]), 4, lens=LensQuery(names, 1))
    for row, answer in enumerate(done.token_map.answers):
        found = of_sample(read(done), row)
        assert found["top_ids"][-1, -len(answer) :, 0].tolist() == answer
        visual = found["image_index"][found["roles"] == Role.IMAGE]
        assert len(visual) > 0 or not model.structure.has_visual_tokens
        assert visual.tolist() == [*range(len(visual))]


@pytest.mark.parametrize("layer", ["lm.norm", "projector", "vision.block.0"])
def test_states_that_the_final_norm_is_not_for_are_refused(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], layer: str
) -> None:
    with pytest.raises(ValueError, match=f"reads lm.embed and lm.block.k, not '{layer}'"):
        shared_backbone.generate(encoded(shared_backbone, pictures, [0]), 2, lens=LensQuery((layer,)))


@pytest.mark.parametrize("top_k", [0, 10_000])
def test_more_tokens_than_there_are_are_refused(
    shared_backbone: VisionLanguageModel, pictures: list[Image.Image], top_k: int
) -> None:
    with pytest.raises(ValueError, match=f"`top_k` must be one of 1 … .*, got {top_k}"):
        shared_backbone.generate(encoded(shared_backbone, pictures, [0]), 2, lens=LensQuery(LAYERS, top_k))


def test_a_sequence_that_is_not_the_prompts_is_refused(pictures: list[Image.Image]) -> None:
    model = VisionLanguageModel(*ODD["git"](), "git")
    with pytest.raises(ValueError, match="not known what stands where"):
        model.generate(encoded(model, pictures, [0]), 2, lens=LensQuery(("lm.block.0",)))
