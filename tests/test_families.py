"""The whole contract of the wrapper, on tiny random models of many families."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone import Role
from conceptshift.lightning_modules.backbone.heat_map import visual_states
from conceptshift.lightning_modules.backbone.interventions import Steering
from conceptshift.lightning_modules.backbone.knockout import AttentionKnockout
from conceptshift.lightning_modules.backbone.prompts import append_answers
from conceptshift.tests.families.crops import CROPS
from conceptshift.tests.families.dynamic import DYNAMIC, ODD
from peft import LoraConfig, PeftModel
from PIL import Image, ImageDraw
from torch import Tensor, nn

FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {**CROPS, **DYNAMIC}
# Every visual token of these is made of the whole picture.
RESAMPLED = {"idefics2", "blip-2", "instructblip", "aria"}
WITHOUT_VISUAL_TOKENS = {"mllama"}
# Tokens of a codebook: they change altogether or not at all.
LOOKED_UP = {"chameleon"}
PLACED = sorted(FAMILIES.keys() - RESAMPLED - WITHOUT_VISUAL_TOKENS - LOOKED_UP)
# Convolutions let a patch reach into the tokens around it.
REACHING = {"got_ocr2"}
# Some positions before the last one of the prompt see what comes after them.
BOTH_WAYS = {"paligemma", "gemma3", "molmo2"}
# The Q-Former counts padding, so that what it makes of a picture depends on the length of the prompts beside it.
COUNTS_PADDING = {"instructblip"}
# Blocks that mix positions without attention.
WITHOUT_ATTENTION = {"qwen3_5", "lfm2_vl"}

PROMPTS = ["What is it?", "Describe this picture in one short sentence."]


@cache
def load(family: str) -> VisionLanguageModel:
    return VisionLanguageModel(*{**FAMILIES, **ODD}[family](), family)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    cells = torch.randint(256, (6, 6, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(cells.numpy()).resize((width, height), Image.Resampling.NEAREST)


def pictures() -> list[Image.Image]:
    return [noise(90, 60), noise(64, 128, seed=1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_self_check(family: str) -> None:
    model = load(family)
    model.self_check()
    logits, state = model._asked()
    with torch.inference_mode():
        ours = model.unembed(state)
    allowed = logits > torch.finfo(logits.dtype).min / 2
    torch.testing.assert_close(ours[allowed], logits[allowed], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["biases", "head"])
@pytest.mark.parametrize("family", [*FAMILIES, *ODD])
def test_a_destination_is_what_peft_makes_of_it(family: str, kind: str, tmp_path: Path) -> None:
    """With trained biases, or a head of its own, beside an original that is what it was."""
    plain = copy.deepcopy(load(family))
    plain.model.requires_grad_(False)  # as PEFT leaves it: torch takes other kernels for what can be trained
    linear = [name for name, module in plain.model.named_modules() if isinstance(module, nn.Linear)]
    head = next(name for name, module in plain.model.named_modules() if module is plain.structure.head)
    chosen = [name for name in linear if name != head]
    more: dict[str, Any] = {"bias": "all"} if kind == "biases" else {"modules_to_save": [head]}
    config = LoraConfig(r=2, target_modules=[*chosen[:6], *chosen[-3:]], **more)
    trained: Any = PeftModel(copy.deepcopy(plain.model), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in trained.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    trained.save_pretrained(tmp_path)
    alone = copy.deepcopy(plain)
    alone.model = PeftModel.from_pretrained(alone.model, tmp_path).eval()
    own, expected = plain.ask(), alone.ask()
    assert not torch.equal(own, expected)
    model = copy.deepcopy(plain)
    sums = model._original.checksums()
    model.add_destination(str(tmp_path))
    for variant, logits in (("original", own), ("destination", expected), ("original", own)):
        with model.running_as(variant):
            assert torch.equal(model.ask(), logits), variant
    assert model._original.checksums() == sums


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_positions_of_one_call_do_not_reach_the_next(family: str) -> None:
    """Models with several parts of positions (M-RoPE) keep where their last prompts ended.

    In any order of calls, with one picture or two, padded or not, every call gives what it gives alone.
    """
    first = load(family)
    one, other = (first.encode([picture], [prompt]) for picture, prompt in zip(pictures(), PROMPTS, strict=True))
    both = first.encode(pictures(), PROMPTS, ["a", "a b c"])
    site = "lm.block.0"
    calls: dict[str, Callable[[VisionLanguageModel], torch.Tensor]] = {
        "logits of one": lambda model: model.logits(one),
        "logits of both": lambda model: model.logits(both),
        "answer to one": lambda model: model.generate(one, 4, model.sites([site])).states[site],
        "answer to the other": lambda model: model.generate(other, 4, model.sites([site])).states[site],
        "answers to both": lambda model: model.generate(both, 4, model.sites([site])).states[site],
        "reading": lambda model: model.read(both, model.sites([site])).states[site],
        "from a cache": lambda model: torch.tensor(model.generate(model.prefill(other), 4).token_map.answers),
        "losses": lambda model: torch.tensor(model.answer_losses(both)),
    }
    alone = {name: call(copy.deepcopy(first)) for name, call in calls.items()}
    model = copy.deepcopy(first)
    order = [name for name in calls for _ in range(3)]
    random.Random(0).shuffle(order)
    for before, name in pairwise(["nothing", *order]):
        torch.testing.assert_close(calls[name](model), alone[name], atol=1e-6, rtol=1e-6, msg=f"{name} after {before}")


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_that_the_model_itself_gives(family: str) -> None:
    model = load(family)
    inputs = model.encode(pictures()[:1], PROMPTS[:1])
    sites = model.sites(["lm.embed", "lm.block.*"])
    states = model.generate(inputs, 1, sites).states
    given = model.model(**inputs, output_hidden_states=True)
    library = given.get("hidden_states") or given.language_model_outputs.hidden_states
    # The library norms what it calls the last hidden state.
    assert len(library) == len(states)
    for ours, theirs in zip(list(states.values())[:-1], library[:-1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - COUNTS_PADDING))
def test_answers_and_states_do_not_depend_on_the_batch(family: str) -> None:
    model = load(family)
    site = model.sites(["lm.block.1"])
    together = model.generate(model.encode(pictures(), PROMPTS), 4, site)
    first = together.token_map.first_column.tolist()
    for row, (picture, prompt) in enumerate(zip(pictures(), PROMPTS, strict=True)):
        alone = model.generate(model.encode([picture], [prompt]), 4, site)
        assert together.token_map.answers[row] == alone.token_map.answers[0]
        own = alone.states["lm.block.1"][0]
        there = together.states["lm.block.1"][row, first[row] :][: len(own)]
        torch.testing.assert_close(there, own, atol=1e-4, rtol=1e-4)
        roles = together.token_map.roles[row, first[row] :]
        assert roles[: alone.token_map.roles.shape[1]].tolist() == alone.token_map.roles[0].tolist()


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - COUNTS_PADDING))
def test_reading_an_answer_gives_the_states_of_writing_it(family: str) -> None:
    model = load(family)
    prompts, site = model.encode(pictures(), PROMPTS), model.sites(["lm.block.2"])
    written = model.generate(prompts, 4, site)
    rows = [[*answer] for answer in written.token_map.answers]
    given = append(model, prompts, rows)
    read = model.read(given, site)
    for row, answer in enumerate(rows):
        ends = [one.token_map.answer_start[row] - 1 for one in (written, read)]
        ours, theirs = (
            one.states["lm.block.2"][row, end : end + len(answer)]
            for one, end in zip((written, read), ends, strict=True)
        )
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def append(model: VisionLanguageModel, prompts: dict[str, Tensor], answers: list[list[int]]) -> dict[str, Tensor]:
    return append_answers(prompts, answers, model.tokenizer.pad_token_id, model.encode.image_token_id)


# --- the token map --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_tokens_are_one_picture_each(family: str) -> None:
    model = load(family)
    done = model.generate(model.encode(pictures(), PROMPTS), 1, model.sites(["lm.embed"]))
    counts = (done.token_map.roles == Role.IMAGE).sum(dim=1).tolist()
    if family in WITHOUT_VISUAL_TOKENS:
        assert counts == [0, 0]
        with pytest.raises(ValueError, match=r"site 'projector' not found \(pictures reach the language model"):
            model.sites(["projector"])
        with pytest.raises(ValueError, match="no patches can be placed: pictures reach the language model through"):
            model.patch_grid(90, 60)
        return
    if family in RESAMPLED:
        with pytest.raises(ValueError, match="made of the whole picture"):
            model.patch_grid(90, 60)
        return
    assert counts == [len(model.patch_grid(*picture.size).tile) for picture in pictures()]


@pytest.mark.parametrize("size", [(200, 140), (70, 150)])
@pytest.mark.parametrize("family", PLACED)
def test_a_marked_patch_is_found(family: str, size: tuple[int, int]) -> None:
    """What is drawn into the box of a visual token changes that token more than any other of its tile."""
    model = load(family)
    plain, grid = noise(*size), model.patch_grid(*size)
    before = visual_tokens(model, plain)
    tokens = [token for token in range(len(grid.tile)) if grid.tile[token] >= 0 and within(grid.boxes[token], size)]
    assert tokens
    for token in tokens[:: max(1, len(tokens) // 8)]:
        left, top, right, bottom = grid.boxes[token].tolist()
        marked = plain.copy()
        inset = [(right - left) / 5, (bottom - top) / 5]
        box = [left + inset[0], top + inset[1], right - inset[0] - 1, bottom - inset[1] - 1]
        ImageDraw.Draw(marked).rectangle(box, fill=other_than(plain, box))
        change = (visual_tokens(model, marked) - before).norm(dim=1)
        tile = (grid.tile == grid.tile[token]).nonzero().flatten()
        found = int(tile[change[tile].argmax()])
        away = max(abs(int(where[found] - where[token])) for where in (grid.row, grid.column))
        assert away <= (family in REACHING), (token, found, grid.boxes[token])


def within(box: Tensor, size: tuple[int, int]) -> bool:
    left, top, right, bottom = box.tolist()
    seen = (min(right, size[0]) - max(left, 0)) * (min(bottom, size[1]) - max(top, 0))
    return bool(seen > 0.8 * (right - left) * (bottom - top) and right - left > 4)


def other_than(picture: Image.Image, box: list[float]) -> tuple[int, int, int]:
    """The color that differs most from what is in a box."""
    pixel = picture.getpixel((int((box[0] + box[2]) / 2), int((box[1] + box[3]) / 2)))
    assert isinstance(pixel, tuple)
    red, green, blue = (0 if value > 127 else 255 for value in pixel)
    return red, green, blue


def visual_tokens(model: VisionLanguageModel, picture: Image.Image) -> Tensor:
    done = model.generate(model.encode([picture], ["?"]), 1, model.sites(["projector"]))
    return done.states["projector"][0, : done.token_map.roles.shape[1] - 1][
        done.token_map.roles[0, : done.states["projector"].shape[1]] == Role.IMAGE
    ]


# --- changing what the model computes -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_adds_to_the_last_block_what_the_unembedding_reads(family: str) -> None:
    model = load(family)
    inputs = model.encode(pictures(), PROMPTS)
    last = f"lm.block.{len(model.structure.blocks) - 1}"
    width = model.unembed.weight.shape[1]
    vector = torch.randn(width, generator=torch.Generator().manual_seed(2))
    state = model.generate(inputs, 1, model.sites([last])).states[last]
    plain = model.logits(inputs)
    with model.intervene(Steering(last, vector, alpha=0.0)):
        assert torch.equal(model.logits(inputs), plain)
    with model.intervene(Steering(last, vector, positions="last_prompt")):
        steered = model.logits(inputs)
    with torch.inference_mode():
        expected = model.unembed(model.final_norm(state[:, -1] + vector))
    allowed = plain[:, -1] > torch.finfo(plain.dtype).min / 2
    torch.testing.assert_close(steered[:, -1][allowed], expected[allowed], atol=1e-3, rtol=1e-3)
    assert torch.equal(steered[:, :-1], plain[:, :-1])


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - WITHOUT_VISUAL_TOKENS))
def test_steering_visual_tokens_reaches_the_answer(family: str) -> None:
    model = load(family)
    inputs = model.encode(pictures(), PROMPTS)
    vector = 5 * torch.randn(model.unembed.weight.shape[1], generator=torch.Generator().manual_seed(2))
    plain = model.logits(inputs)
    with model.intervene(Steering("projector", vector)):
        steered = model.logits(inputs)
    assert (steered[:, -1] - plain[:, -1]).abs().max() > 1e-4
    is_image = torch.eq(inputs["input_ids"], model.encode.image_token_id or 0)
    for row, column in enumerate(is_image.int().argmax(dim=1).tolist()):
        start = int(inputs["attention_mask"][row].argmax())
        if family not in BOTH_WAYS:
            assert torch.equal(steered[row, start:column], plain[row, start:column])


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - WITHOUT_VISUAL_TOKENS - WITHOUT_ATTENTION))
def test_knocking_the_picture_out_of_the_last_position(family: str) -> None:
    model = load(family)
    inputs = model.encode(pictures(), PROMPTS)
    blocks = list(range(len(model.structure.blocks)))
    plain = model.logits(inputs)
    with model.intervene(AttentionKnockout("image", "last_prompt", blocks)):
        knocked = model.logits(inputs)
    assert (knocked[:, -1] - plain[:, -1]).abs().max() > 1e-4
    if family not in BOTH_WAYS:
        assert torch.equal(knocked[:, :-1], plain[:, :-1])


@pytest.mark.parametrize("family", sorted(WITHOUT_ATTENTION))
def test_a_block_without_attention_has_none_to_knock_out(family: str) -> None:
    model = load(family)
    with (
        pytest.raises(ValueError, match="no attention"),
        model.intervene(AttentionKnockout("image", "last_prompt", range(len(model.structure.blocks)))),
    ):
        model.logits(model.encode(pictures(), PROMPTS))


# --- whatever a model's files say -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama", "florence2"])
@pytest.mark.parametrize("setting", [{"num_beams": 3}, {"use_cache": False}, {"do_sample": True, "temperature": 9.0}])
def test_answers_are_greedy_and_cached_whatever_the_model_says(family: str, setting: dict[str, Any]) -> None:
    model = load(family)
    inputs, site = model.encode(pictures(), PROMPTS), model.sites(["lm.block.1"])
    vector = torch.randn(model.unembed.weight.shape[1], generator=torch.Generator().manual_seed(2))
    done = []
    for settings in ({}, setting):
        with pytest.MonkeyPatch.context() as patch, model.intervene(Steering("lm.block.0", vector, positions="answer")):
            for name, value in settings.items():
                patch.setattr(model.model.generation_config, name, value)
            done.append(model.generate(inputs, 4, site))
    assert done[0].token_map.answers == done[1].token_map.answers
    assert torch.equal(done[0].states["lm.block.1"], done[1].states["lm.block.1"])


# Earlier positions of the prompt see its last one, or the model has its own way to generate.
NOT_PREFILLED = {"paligemma", "blip-2", "instructblip", "janus"}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NOT_PREFILLED))
def test_prompts_in_the_cache_say_the_same(family: str) -> None:
    model = load(family)
    one, other = model.encode(pictures(), PROMPTS), model.encode(pictures()[::-1], PROMPTS)
    assert model.can_prefill(one)
    first, second = model.prefill(one), model.prefill(other)
    for inputs, prefilled in ((one, first), (other, second)):
        for _ in range(2):  # what is in the cache can be used again
            assert model.generate(prefilled, 4).token_map.answers == model.generate(inputs, 4).token_map.answers


@pytest.mark.parametrize("family", sorted(NOT_PREFILLED))
def test_prompts_that_cannot_be_cached_are_told_apart(family: str) -> None:
    model = load(family)
    assert not model.can_prefill(model.encode(pictures(), PROMPTS))


@pytest.mark.parametrize("family", sorted(set(PLACED) - {"chameleon"}))
def test_patches_in_half_precision(family: str) -> None:
    network, processor = FAMILIES[family]()
    grids = [VisionLanguageModel(network.to(dtype), processor, family).patch_grid(200, 140) for dtype in
             (torch.float32, torch.float16)]  # fmt: skip
    whole, half = grids
    for name in ("tile", "row", "column"):
        assert torch.equal(getattr(whole, name), getattr(half, name)), name
    torch.testing.assert_close(half.boxes, whole.boxes, atol=3, rtol=0)


def test_convolutions_do_not_move_patches() -> None:
    boxes = load("got_ocr2").patch_grid(200, 140).boxes
    row, column = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(dim=1)
    expected = torch.stack([50 * column, 35 * row, 50 * (column + 1), 35 * (row + 1)], dim=1)
    torch.testing.assert_close(boxes, expected.float(), atol=1, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sequence_begins_once_and_answers_end(family: str) -> None:
    model = load(family)
    inputs = model.encode(pictures(), PROMPTS, ["a star", "red"])
    bos = model.tokenizer.bos_token_id
    if bos is not None and bos != model.tokenizer.eos_token_id:
        assert (inputs["input_ids"] == bos).sum(dim=1).max() <= 1
    for row, target in enumerate(["a star", "red"]):
        learned = inputs["labels"][row][inputs["labels"][row] >= 0]
        assert model.tokenizer.decode(learned, skip_special_tokens=True).strip() == target


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - LOOKED_UP))
def test_the_vision_tower_is_its_longest_list(family: str) -> None:
    structure = load(family).structure
    config = structure.model.config.vision_config
    depth = next(getattr(config, name) for name in ("num_hidden_layers", "depth") if hasattr(config, name))
    assert len(structure.image_blocks) == depth


# --- models that do not read their picture as tokens of the prompt ---------------------------------------

ENCODER_DECODER = ("florence2", "t5gemma2")


@pytest.mark.parametrize("family", ODD)
def test_the_odd_ones_know_what_they_say(family: str) -> None:
    model = load(family)
    model.self_check()
    with pytest.raises(ValueError, match="no patches can be placed: "):
        model.patch_grid(90, 60)
    with pytest.raises(ValueError, match="site 'projector' not found"):
        model.sites(["projector"])


@pytest.mark.parametrize("family", ENCODER_DECODER)
def test_a_decoder_of_its_own_is_read_and_steered(family: str) -> None:
    model = load(family)
    last = f"lm.block.{len(model.structure.blocks) - 1}"
    inputs = model.encode(pictures(), PROMPTS)
    done = model.generate(inputs, 4, model.sites([last]))
    assert done.token_map.answer_start.tolist() == [1, 1]
    for row, answer in enumerate(done.token_map.answers):
        with torch.inference_mode():
            said = model.unembed(model.final_norm(done.states[last][row, : len(answer)])).argmax(dim=-1)
        # Florence is made to begin and to end as it does.
        free = slice(1, -1) if model.model.generation_config.forced_eos_token_id is not None else slice(None)
        assert said.tolist()[free] == answer[free]
    token = next(token for token in range(50, 60) if token not in done.token_map.answers[0])
    with model.intervene(Steering(last, 100 * model.unembed.weight[token].detach())):
        assert token in model.generate(inputs, 4).token_map.answers[0]


def test_a_tower_in_stages_has_the_last_block_of_each() -> None:
    structure = load("florence2").structure
    names = [structure.name_of(block) for block in structure.image_blocks]
    depths = structure.model.config.vision_config.depths
    assert names == [f"model.vision_tower.blocks.{stage}.{depth - 1}" for stage, depth in enumerate(depths)]


@pytest.mark.parametrize("family", ENCODER_DECODER)
def test_what_a_decoder_of_its_own_cannot_is_refused_by_name(family: str) -> None:
    model = load(family)
    inputs = model.encode(pictures(), PROMPTS, ["red", "a star"])
    for run in (model.read, model.logits, model.prefill, model):
        with pytest.raises(ValueError, match=f"^{family}: no .*: an encoder reads picture and prompt"):
            run(inputs)


def test_steering_is_tried_where_there_is_no_final_norm() -> None:
    model = load("florence2")
    vector = torch.ones(model.unembed.weight.shape[1])
    model.try_steering(model.encode(pictures(), PROMPTS), [Steering("lm.block.0", vector)], 3)
    with pytest.raises(ValueError, match=r"positions 'image' match nothing at 'lm\.block\.0' \(an encoder reads"):
        model.try_steering(model.encode(pictures(), PROMPTS), [Steering("lm.block.0", vector, positions="image")], 3)


@pytest.mark.parametrize("family", ["mllama", "florence2"])
def test_there_are_no_visual_tokens_to_draw(family: str) -> None:
    with pytest.raises(ValueError, match=f"{family} has no visual tokens to read: "):
        visual_states(load(family), pictures(), PROMPTS, "lm.block.0")
