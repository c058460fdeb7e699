"""Attention knockout: targets do not attend to sources, everything else stays, whatever the mask and the way to run.

Parity is with a Llama written out by hand, one sample at a time, without padding, cache, masks or hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone import Generation, Role, Selector, Site, Steering, TokenMap
from conceptshift.lightning_modules.backbone.knockout import AttentionKnockout, knocking_out, self_attention
from conceptshift.lightning_modules.backbone.prompts import append_answers
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2Model,
    LlavaConfig,
    MllamaTextModel,
    NemotronHConfig,
    NemotronHModel,
    Qwen2Config,
    Qwen3_5TextConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

PROMPTS = ["Where is this?", "How many shapes are there in this picture?", "What?", "Is the circle red?", "Who?"]
TARGETS = ["on the beach", "2", "a red circle and a blue star", "red", "a heart in space"]
# Shorter than some sequences: behind the masks' end nothing holds.
_RANDOM = torch.rand(2, 5, 78, generator=torch.Generator().manual_seed(0)) < 0.4
_RANDOM[:, :, -1] = True
_RANDOM[0, :, 0] = False  # whoever attends to nothing else attends to the first position

KNOCKOUTS = [
    AttentionKnockout("image", "last_prompt", [1]),
    AttentionKnockout("image", "answer", [0, 2]),
    AttentionKnockout("3:70", "text", [0, 1]),
    AttentionKnockout("generated", "generated", [1]),  # themselves included
    AttentionKnockout("60", "60", [2]),  # itself only
    AttentionKnockout(_RANDOM[0], _RANDOM[1], [0, 1, 2]),
]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, tiny: Path) -> VisionLanguageModel:
    return VisionLanguageModel.load(str(tiny), attention=request.param)


def encoded(
    model: VisionLanguageModel, pictures: Sequence[Image.Image], rows: Sequence[int], targets: bool
) -> dict[str, Tensor]:
    answers = [TARGETS[row] for row in rows] if targets else None
    return model.encode([pictures[row] for row in rows], [PROMPTS[row] for row in rows], answers)


def of_rows(knockout: AttentionKnockout, rows: Sequence[int]) -> AttentionKnockout:
    """The same for some samples of a batch."""
    sources, targets = (
        given[list(rows)] if isinstance(given, Tensor) else given for given in (knockout.sources, knockout.targets)
    )
    return AttentionKnockout(sources, targets, knockout.blocks)


# --- by hand --------------------------------------------------------------------------------------------


def positions(given: str | Tensor, token_map: TokenMap, row: int) -> Tensor:
    """Where it holds in one sample without padding [T]."""
    here = token_map.roles[row] != Role.PAD
    if isinstance(given, str):
        return Selector.parse(given).mask(token_map, 0, len(here))[row, here]
    length = int(here.sum())
    return nn.functional.pad(given[row], (0, max(0, length - given.shape[1])))[:length]


def by_hand(model: VisionLanguageModel, f: Tensor, knockout: AttentionKnockout, of: Generation, row: int) -> Tensor:
    """The normed last states [T, D] of one sample from its embeddings [T, D]."""
    decoder: Any = model.decoder
    config, length = decoder.config, len(f)
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    angles: Tensor = torch.arange(length)[:, None] / config.rope_parameters["rope_theta"] ** (
        torch.arange(0, size, 2) / size
    )
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    sources, targets = (positions(given, of.token_map, row)[:length] for given in (knockout.sources, knockout.targets))

    def rotated(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1) * sin

    def normed(x: Tensor, norm: Any) -> Tensor:
        scaled: Tensor = norm.weight * x / (x.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return scaled

    for number, block in enumerate(decoder.layers):
        x, attention = normed(f, block.input_layernorm), block.self_attn
        q, k, v = (
            (x @ part.weight.T).view(length, heads, size).transpose(0, 1)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = rotated(q) @ rotated(k).transpose(1, 2) / size**0.5
        forbidden = torch.ones(length, length).triu(1).bool()
        if number in knockout.blocks:
            forbidden |= targets[:, None] & sources
        scores[:, forbidden] = float("-inf")
        f = f + (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(length, -1) @ attention.o_proj.weight.T
        x, mlp = normed(f, block.post_attention_layernorm), block.mlp
        gated = nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
        f = f + gated @ mlp.down_proj.weight.T
    return normed(f, decoder.norm)


@pytest.mark.parametrize("knockout", KNOCKOUTS, ids=range(6))
def test_reading_and_writing_are_as_by_hand(
    model: VisionLanguageModel, pictures: list[Image.Image], knockout: AttentionKnockout
) -> None:
    """In a batch with padding on the right (read) and on the left (generated through the cache), and one alone."""
    sites = model.sites(["lm.embed", "lm.norm"])
    with model.intervene(knockout):
        read = model.read(encoded(model, pictures, range(5), targets=True), sites)
        written = model.generate(encoded(model, pictures, range(5), targets=False), 5, sites)
    with model.intervene(of_rows(knockout, [1])):
        alone = model.generate(encoded(model, pictures, [1], targets=False), 5, sites)
    assert len(set(read.token_map.answer_start.tolist())) > 2
    cases = [(read, 0, knockout), (read, 2, knockout), (written, 1, knockout), (written, 2, knockout)]
    for of, row, applied in [*cases, (alone, 0, of_rows(knockout, [1]))]:
        here = (of.token_map.roles[row] != Role.PAD)[: of.states["lm.norm"].shape[1]]
        expected = by_hand(model, of.states["lm.embed"][row, here], applied, of, row)
        torch.testing.assert_close(of.states["lm.norm"][row, here], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("knockout", KNOCKOUTS, ids=range(6))
def test_logits_are_alike_on_either_side_of_the_padding(
    model: VisionLanguageModel, pictures: list[Image.Image], knockout: AttentionKnockout
) -> None:
    left = encoded(model, pictures, range(5), targets=False)
    lengths = left["attention_mask"].sum(dim=1).tolist()
    assert len(set(lengths)) > 2
    right = {name: value.clone() for name, value in left.items()}
    for name in ("input_ids", "attention_mask"):
        for row, length in enumerate(lengths):
            right[name][row] = left[name][row].roll(length, 0)
    plain = model.logits(right)
    with model.intervene(knockout):
        one, other = model.logits(left), model.logits(right)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(one[row, -length:], other[row, :length], rtol=1e-3, atol=1e-3)
    # What generates only is no target here: behind the prompt there is nothing.
    assert torch.equal(other, plain) == (knockout.targets == "generated")


@pytest.mark.parametrize("knockout", KNOCKOUTS, ids=range(6))
def test_every_knockout_changes_the_logits_behind_its_targets_only(
    model: VisionLanguageModel, pictures: list[Image.Image], knockout: AttentionKnockout
) -> None:
    inputs = encoded(model, pictures, range(5), targets=True)
    token_map, plain = model.read(inputs).token_map, model.logits(inputs)
    with model.intervene(knockout):
        changed = model.logits(inputs)
    assert changed.isfinite().all()
    for row in range(5):
        here = token_map.roles[row] != Role.PAD
        targets, sources = (positions(given, token_map, row) for given in (knockout.targets, knockout.sources))
        seeing = targets & (sources.cumsum(dim=0) > 0)  # a source comes before them, or is where they are
        distance = (changed[row, here] - plain[row, here]).abs().amax(dim=-1)
        if not seeing.any():
            assert distance.max() == 0
            continue
        first = int(seeing.to(torch.uint8).argmax())
        assert (distance[:first] < 1e-4).all()
        assert (distance[seeing] > 1e-4).all()


def test_sdpa_and_eager_agree(tiny: Path, pictures: list[Image.Image]) -> None:
    models = [VisionLanguageModel.load(str(tiny), attention=name) for name in ("sdpa", "eager")]
    for knockout in KNOCKOUTS:
        results = []
        for model in models:
            with model.intervene(knockout):
                results.append(model.logits(encoded(model, pictures, range(5), targets=True)))
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("nothing", ["sources", "targets"])
def test_a_knockout_of_nothing_is_exactly_the_unchanged_model(
    model: VisionLanguageModel, pictures: list[Image.Image], nothing: str
) -> None:
    empty = torch.zeros(5, 90, dtype=torch.bool)
    given: dict[str, str | Tensor] = {"sources": "image", "targets": "text", nothing: empty}
    inputs, sites = encoded(model, pictures, range(5), targets=False), model.sites(["lm.*"])
    plain = model.generate(inputs, 5, sites)
    with model.intervene(AttentionKnockout(given["sources"], given["targets"], [0, 1, 2])):
        same = model.generate(inputs, 5, sites)
    after = model.generate(inputs, 5, sites)
    for other in (same, after):
        assert all(torch.equal(other.states[name], plain.states[name]) for name in plain.states)


def test_several_forbid_together(model: VisionLanguageModel, pictures: list[Image.Image]) -> None:
    """Two halves in the same blocks, and a steering between them, are the whole with the steering."""
    inputs = encoded(model, pictures, range(5), targets=True)
    steering = Steering("lm.block.0", torch.ones(64), positions="image")
    halves = [AttentionKnockout(sources, "answer", [1, 2]) for sources in ("5:30", "30:69")]
    with model.intervene(halves[0], steering, halves[1]):
        one = model.logits(inputs)
    with model.intervene(steering, AttentionKnockout("5:69", "answer", [2, 1])):
        torch.testing.assert_close(model.logits(inputs), one)


def test_prompts_that_were_run_before(model: VisionLanguageModel, pictures: list[Image.Image]) -> None:
    """The last position of the prompt comes alone, on top of the cache."""
    inputs = encoded(model, pictures, range(5), targets=False)
    prefilled = model.prefill(inputs)
    plain = model.generate(prefilled, 6).token_map.answers
    with model.intervene(AttentionKnockout("image", "answer", [0, 1, 2])):
        answers = model.generate(inputs, 6).token_map.answers
        assert model.generate(prefilled, 6).token_map.answers == answers
    assert answers != plain, "the knockout is too weak for the test"


def test_low_precision(tiny: Path, pictures: list[Image.Image]) -> None:
    for attention in ("sdpa", "eager"):
        model = VisionLanguageModel.load(str(tiny), dtype="bfloat16", attention=attention)
        inputs = encoded(model, pictures, range(3), targets=True)
        plain = model.logits(inputs)
        with model.intervene(AttentionKnockout("image", "answer", [1])):
            changed = model.logits(inputs)
        assert changed.dtype == plain.dtype == torch.bfloat16
        assert changed.isfinite().all()
        assert not torch.equal(changed, plain)


# --- other language models ------------------------------------------------------------------------------

_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
# Shorter than a prompt, and long enough for a part of the picture.
_WINDOW = 40


_LANGUAGE_MODELS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "windows": (
        Qwen2Config, {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1},
    ),
    "alternating": (
        Gemma3TextConfig,
        {"sliding_window": _WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "hybrid": (Qwen3_5TextConfig, {"layer_types": ["linear_attention", "full_attention", "full_attention"]}),
}  # fmt: skip


def other_model(start: VisionLanguageModel, name: str, attention: str) -> VisionLanguageModel:
    """The tiny model around another language model, with random weights; no answer ends before its sixth token."""
    kind, more = _LANGUAGE_MODELS[name]
    old = start.model.config
    tokens = {name: getattr(old.text_config, name) for name in ("vocab_size", "eos_token_id", "pad_token_id")}
    config = LlavaConfig(**{**old.to_dict(), "text_config": kind(**_SIZES, **tokens, **more).to_dict()})
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.generation_config = copy.deepcopy(start.model.generation_config)
    model.generation_config.min_new_tokens = 6
    return VisionLanguageModel(model.eval(), start.processor, name)


@pytest.fixture(scope="module", params=["windows sdpa", "windows eager", "alternating sdpa", "alternating eager"])
def other(request: pytest.FixtureRequest, shared_backbone: VisionLanguageModel) -> VisionLanguageModel:
    return other_model(shared_backbone, *request.param.split())


PAIRS = [("image", "answer"), ("30:66", "66:70"), ("66:70", "72:")]


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize(("sources", "targets"), PAIRS)
def test_what_happens_at_a_source_does_not_reach_a_target(
    other: VisionLanguageModel, pictures: list[Image.Image], block: int, sources: str, targets: str
) -> None:
    """Whatever mask the block has: a change at the sources in front of it moves its targets only without knockout."""
    inputs = encoded(other, pictures, range(5), targets=True)
    site = f"lm.block.{block}"
    push = Steering(f"lm.block.{block - 1}", torch.linspace(-3, 3, 64), positions=sources)
    knockout = AttentionKnockout(sources, targets, [block])

    def states(*interventions: Steering | AttentionKnockout) -> tuple[Tensor, TokenMap]:
        with other.intervene(*interventions):
            done = other.read(inputs, other.sites([site]))
        return done.states[site], done.token_map

    plain, token_map = states()
    at_targets = Selector.parse(targets).mask(token_map, 0, plain.shape[1])
    pushed, out, pushed_out = (states(*both)[0] for both in ([push], [knockout], [push, knockout]))
    distance = (pushed - plain).abs().amax(dim=-1)[at_targets]
    assert (distance > 1e-3).any(), "the push is too weak for the test"
    torch.testing.assert_close(pushed_out[at_targets], out[at_targets], rtol=1e-4, atol=1e-4)
    elsewhere = (token_map.roles != Role.PAD) & ~at_targets
    torch.testing.assert_close(out[elsewhere], plain[elsewhere], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sources", "targets"), PAIRS)
def test_written_as_read_and_together_as_alone(
    other: VisionLanguageModel, pictures: list[Image.Image], sources: str, targets: str
) -> None:
    """Token by token from a cache that may have lost what is out of the window."""
    inputs = encoded(other, pictures, range(3), targets=False)
    sites = other.sites(["lm.norm"])
    plain = other.generate(inputs, 6, sites)
    with other.intervene(AttentionKnockout(sources, targets, [1, 2])):
        written = other.generate(inputs, 6, sites)
        again = append_answers(inputs, written.token_map.answers, other.tokenizer.pad_token_id)
        read = other.read(again, sites)
        alone = other.generate(encoded(other, pictures, [1], targets=False), 6, sites)
    assert {len(answer) for answer in written.token_map.answers} == {6}
    answers = [of.select(Selector.parse("answer"), other.vocabulary) for of in (written, read, alone, plain)]
    one, two, three, before = (rows.states["lm.norm"] for rows in answers)
    assert not torch.allclose(one, before, atol=1e-2)
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one[torch.tensor(answers[0].samples) == 1], three, rtol=1e-3, atol=1e-3)


def test_windows_are_shorter_than_the_prompt(shared_backbone: VisionLanguageModel, pictures: list[Image.Image]) -> None:
    """Without which the tests above would not be about windows."""
    lengths = encoded(shared_backbone, pictures, range(5), targets=False)["attention_mask"].sum(dim=1)
    assert int(lengths.min()) > _WINDOW + 10
    model = other_model(shared_backbone, "alternating", "sdpa")
    inputs = encoded(model, pictures, [0], targets=False)
    last = inputs["input_ids"].shape[1] - 1
    for block, seen in ((1, True), (2, False)):
        push = Steering(f"lm.block.{block - 1}", torch.linspace(-3, 3, 64), positions="0:20")
        states = []
        for interventions in ([], [push]):
            with model.intervene(*interventions):
                states.append(model.generate(inputs, 6, model.sites([f"lm.block.{block}"])).states[f"lm.block.{block}"])
        assert torch.equal(states[0][0, last], states[1][0, last]) != seen


# --- what is refused ------------------------------------------------------------------------------------


def hooks(model: VisionLanguageModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_gone_after_an_exception(model: VisionLanguageModel, pictures: list[Image.Image]) -> None:
    inputs = encoded(model, pictures, range(2), targets=True)
    before, plain = hooks(model), model.logits(inputs)
    knockout = AttentionKnockout("image", "answer", [0, 2])
    with pytest.raises(AssertionError), model.intervene(knockout):
        assert hooks(model) != before + 2
    assert hooks(model) == before
    # In the middle of a pass, and where the second cannot even begin.
    masks = AttentionKnockout(torch.ones(3, 9, dtype=torch.bool), "text", [1])
    with (
        pytest.raises(ValueError, match="with 3 masks of positions for a batch of 2"),
        model.intervene(knockout, masks),
    ):
        model.logits(inputs)
    assert hooks(model) == before
    with pytest.raises(ValueError, match=r"'lm\.block\.3' not found: the model has"):
        model.intervene(knockout, AttentionKnockout("image", "text", [0, 3])).__enter__()
    assert hooks(model) == before
    assert torch.equal(model.logits(inputs), plain)


@pytest.mark.parametrize("sources", ["all", "0:"])
def test_a_target_must_see_something(model: VisionLanguageModel, pictures: list[Image.Image], sources: str) -> None:
    """Not a number otherwise, or all positions alike; one position left is enough."""
    inputs = encoded(model, pictures, range(3), targets=True)
    message = r"at 'lm\.block\.1': position 70 of sample 0 would attend to nothing; leave it a position"
    with model.intervene(AttentionKnockout(sources, "70", [1])), pytest.raises(ValueError, match=message):
        model.logits(inputs)
    with model.intervene(AttentionKnockout("1:", "70:", [1])):
        assert model.logits(inputs).isfinite().all()
    with model.intervene(AttentionKnockout("71:", "70:", [1])):
        assert model.logits(inputs).isfinite().all()


def test_a_model_must_be_run_through_the_wrapper(model: VisionLanguageModel) -> None:
    with model.intervene(AttentionKnockout("image", "text", [1])), pytest.raises(RuntimeError, match="must be run"):
        model.model(input_ids=torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("sources", "targets", "blocks", "message"),
    [
        ("image", "text", [], "`blocks` must name at least one block"),
        ("image", "-1", [0], "`targets`: positions '-1' are known only after generation"),
        ("answer_mean", "text", [0], "`sources`: positions 'answer_mean' are known only after generation"),
        ("everywhere", "text", [0], "selector 'everywhere': expected one of"),
        (torch.ones(2, 3), "text", [0], r"`sources`: a mask of positions must be boolean \[B, L\], got torch.float32"),
        ("image", torch.ones(3).bool(), [0], r"`targets`: a mask of positions must be boolean \[B, L\], .* \[3\]"),
    ],
)
def test_what_is_no_knockout(sources: str | Tensor, targets: str | Tensor, blocks: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionKnockout(sources, targets, blocks)


def test_flash_attention_takes_no_mask() -> None:
    knockout = AttentionKnockout("image", "text", [0])
    message = "'flash_attention_2' does not take; load the model with `attention: sdpa`"
    with pytest.raises(ValueError, match=message):
        knocking_out([], knockout, lambda: None, "flash_attention_2").__enter__()


def test_a_block_without_attention(shared_backbone: VisionLanguageModel) -> None:
    model = other_model(shared_backbone, "hybrid", "sdpa")
    message = r"'lm\.block\.0' \(linear_attn, .*\) has no attention that a mask of positions could"
    with pytest.raises(ValueError, match=message), model.intervene(AttentionKnockout("image", "text", [1, 0])):
        pass
    assert hooks(model) == 0


_FEW: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        (
            Lfm2Model,
            Lfm2Config(**_FEW, num_hidden_layers=2, layer_types=["conv", "full_attention"]),
            [r"'b\.0' \(conv, .*\) has no attention", "Lfm2Attention"],
        ),
        (
            NemotronHModel,
            NemotronHConfig(**_FEW, layers_block_type=["mamba", "attention"]),
            [r"'b\.0' \(norm, mixer\) has no attention", "NemotronHAttention"],
        ),
        (
            MllamaTextModel,
            MllamaTextConfig(**_FEW, num_hidden_layers=2, cross_attention_layers=[0]),
            [r"'b\.0' has cross-attention, whose keys are no positions", "MllamaTextSelfAttention"],
        ),
    ],
)
def test_attention_is_found_by_role(kind: Any, config: Any, expected: list[str]) -> None:
    with torch.device("meta"):
        model = kind(config)
    blocks = [Site(f"b.{number}", block, "output", "sequence") for number, block in enumerate(model.layers)]
    with pytest.raises(ValueError, match=expected[0]):
        self_attention(blocks[0])
    assert type(self_attention(blocks[1])).__name__ == expected[1]
