"""Steering: α = 0 changes nothing, only the selected positions change, and nothing outlives its context."""

from __future__ import annotations

from collections.abc import Sequence

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
POSITIONS = ["all", "prompt", "last_prompt", "image", "text", "answer", "0", "3:70", "66:"]
SITES = ["projector", "lm.embed", "lm.block.0", "lm.block.2", "lm.norm"]


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
