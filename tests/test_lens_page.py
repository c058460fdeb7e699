"""The page of the logit lens, in a real browser: it shows the numbers that it was given, and runs nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conceptshift.callbacks.parts.lens_page import LensPage, LensVariant, write_index, write_page
from conceptshift.datamodules import CAPTION_PROMPT
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone.patch_grid import PatchGrid
from conceptshift.tests.browser import Browser, Tab, chromium
from numpy.typing import NDArray
from PIL import Image

EVIL = "<script>ran.push(1)</script>"
EVILS = [EVIL, f"</script>{EVIL}", "<!--<script>", '"><img src=x onerror=ran.push(2)>', "{{ 7 * 7 }}", "&lt;b&gt;"]
TEXTS = [" dog", "dog", " Dogs", " hotdog", "\n", "", ".", "12", " a", " über", "дом", "\u202eabc", *EVILS]
SIZE = 60, 40
# Tiles as left, top, right, bottom, rows, columns, and what the page shows for them: a margin, but not of nothing.
TILES = [(0, 0, 60, 40, 3, 4), (30, 20, 60, 40, 2, 3)]
REGIONS = [(0, 0, 60, 40), (29.4, 19.4, 60, 40)]
PATCHES = [12, 6]
LAYERS, TOP = 4, 3


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Tab]]:
    """Write a page and open it; afterwards it must have asked for nothing and complained of nothing."""
    tabs = []

    def run(page: LensPage, decode: Callable[[int], str] = TEXTS.__getitem__, **options: Any) -> Tab:
        write_page(tmp_path / "page.html", page, decode)
        tabs.append(browser.open(tmp_path / "page.html", **options))
        return tabs[-1]

    yield run
    for tab in tabs:
        assert tab.errors == []
        assert tab.evaluate("ran") == []
        assert [url for url in tab.requests if not url.startswith("data:image/jpeg")] == [
            (tmp_path / "page.html").as_uri()
        ]
        browser.close(tab)


def make_grid() -> PatchGrid:
    """Two tiles, and behind each row of the second a token that covers nothing."""
    rows = []
    for tile, (left, top, right, bottom, down, across) in enumerate(TILES):
        width, height = (right - left) / across, (bottom - top) / down
        for row in range(down):
            for column in range(across):
                x, y = left + column * width, top + row * height
                rows.append((tile, row, column, x, y, x + width, y + height))
    rows.append((-1, -1, -1, 0, 0, 0, 0))
    values = torch.tensor(rows)
    tile, row_of, column_of = values[:, :3].long().T
    return PatchGrid(tile, row_of, column_of, values[:, 3:])


def make_variant(name: str, seed: int, visual: int = 19, answer: int = 3, layers: int = LAYERS) -> LensVariant:
    """Random lists: a token that begins, visual tokens, two of the prompt, and an answer."""
    random = np.random.default_rng(seed)
    positions = 1 + visual + 2 + answer
    ids = random.random((layers, positions, len(TEXTS))).argsort(axis=-1)[..., :TOP]
    p = -np.sort(-random.dirichlet([0.4] * (TOP + 1), (layers, positions))[..., :TOP])
    image_index = np.full(positions, -1)
    image_index[1 : 1 + visual] = np.arange(visual)
    token_ids = np.concatenate([[4], np.full(visual, 6), [0, 12], random.integers(0, len(TEXTS), answer)])
    roles = ["special", *["image"] * visual, "prompt", "prompt", *["answer"] * answer]
    return LensVariant(name, f"answer of {name}", token_ids, roles, image_index, ids, p.astype(np.float32))


def make_page(*variants: LensVariant, grid: bool = True) -> LensPage:
    # Of one color, so that what is drawn over it can be compared.
    return LensPage(
        title="a/picture.jpg",
        picture=Image.new("RGB", SIZE, (120, 120, 120)),
        prompt="What is it?\nSay it.",
        references=["A dog."],
        model="some/model",
        layers=["lm.embed", *(f"lm.block.{number}" for number in range(LAYERS - 1))],
        grid=make_grid() if grid else None,
        no_grid="" if grid else "every visual token is made of <b>all</b>",
        variants=variants or [make_variant("original", 0)],
    )


def visible(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\u202e", "\\u{202e}") or "∅"


def of_patches(variant: LensVariant, tile: int) -> NDArray[np.int64]:
    """Positions of the patches of a tile."""
    return 1 + np.arange(PATCHES[tile]) + sum(PATCHES[:tile])


def share(patch: int, tile: int) -> tuple[float, float]:
    """Where in what is shown of the picture the middle of a patch is, as shares of its width and height."""
    left, top, right, bottom, down, across = TILES[tile]
    row, column = divmod(patch, across)
    x, y = left + (column + 0.5) * (right - left) / across, top + (row + 0.5) * (bottom - top) / down
    from_x, from_y, to_x, to_y = REGIONS[tile]
    return (x - from_x) / (to_x - from_x), (y - from_y) / (to_y - from_y)


def centre(tab: Tab, patch: int, tile: int = 0, figure: int = 0) -> tuple[float, float]:
    """Where in the window the middle of a patch is; brings its picture there."""
    tab.evaluate(f"document.querySelectorAll('canvas')[{figure}].scrollIntoView({{block: 'center'}})")
    frame = tab.evaluate(f"document.querySelectorAll('canvas')[{figure}].getBoundingClientRect().toJSON()")
    across, down = share(patch, tile)
    return frame["left"] + across * frame["width"], frame["top"] + down * frame["height"]


def brightness(tab: Tab, tile: int = 0, figure: int = 0) -> NDArray[np.float64]:
    """How bright the middle of each patch of a tile is drawn."""
    places = [share(patch, tile) for patch in range(PATCHES[tile])]
    # From a copy: a canvas that is read from is drawn another way.
    pixels = tab.evaluate(
        f"""(() => {{
            const drawn = document.querySelectorAll('canvas')[{figure}];
            const pen = new OffscreenCanvas(drawn.width, drawn.height).getContext('2d', {{willReadFrequently: true}});
            pen.drawImage(drawn, 0, 0);
            return {list(map(list, places))}.map(
                ([x, y]) => [...pen.getImageData(x * drawn.width, y * drawn.height, 1, 1).data]);
        }})()"""
    )
    found: NDArray[np.float64] = np.array(pixels)[:, :3] @ [0.2126, 0.7152, 0.0722]
    return found


def panel(tab: Tab) -> tuple[list[list[str]], list[list[str]]]:
    """Tokens and probabilities in the panel [layers][tokens]."""
    rows = [
        [tab.texts(f"#layers tbody tr:nth-child({layer + 1}) .{kind}") for layer in range(LAYERS)]
        for kind in ("token", "chance")
    ]
    return rows[0], rows[1]


def assert_panel(tab: Tab, variant: LensVariant, position: int, texts: list[str] = TEXTS) -> None:
    """The panel has the lists of a position, and marks the layer that is surest."""
    tokens, chances = panel(tab)
    assert tokens == [[visible(texts[token]) for token in row] for row in variant.top_ids[:, position].tolist()]
    for row, expected in zip(chances, variant.top_probabilities[:, position], strict=True):
        found = [float(value.removeprefix("<")) for value in row]
        # As many digits as are shown: one behind the point, or two significant ones.
        np.testing.assert_allclose(found, 100 * expected, atol=0.051, rtol=0.051)
    (best,) = [layer for layer in range(LAYERS) if "best" in row_class(tab, layer)]
    p = variant.top_probabilities[:, position, 0]
    assert best == p.argmax()
    name = "embed" if best == 0 else f"block {best - 1}"
    text = visible(texts[variant.top_ids[best, position, 0]])
    assert tab.text("#best").startswith(f"most confident: {name}, {text} ")


def row_class(tab: Tab, layer: int) -> str:
    name: str = tab.evaluate(f"document.querySelector('#layers tbody').rows[{layer}].className")
    return name


def test_hovering_a_patch_shows_what_every_layer_decodes(show: Callable[..., Tab]) -> None:
    variants = [make_variant("original", 0), make_variant("destination", 1)]
    tab = show(make_page(*variants))
    for figure, variant in enumerate(variants):
        for patch in (0, 6, 11):
            tab.move(*centre(tab, patch, figure=figure))
            row, column = divmod(patch, 4)
            assert tab.text("#place") == f"patch row {row}, column {column}, tile 0, position {1 + patch}"
            assert tab.text("#viewed") == variant.name
            assert_panel(tab, variant, 1 + patch)
            # The patch is framed where it is, in every picture.
            cursor = tab.evaluate(f"document.querySelectorAll('.cursor')[{figure}].getBoundingClientRect().toJSON()")
            x, y = centre(tab, patch, figure=figure)
            assert cursor["left"] < x < cursor["right"]
            assert cursor["top"] < y < cursor["bottom"]
    tab.press("t")
    for patch in (0, 4):
        tab.move(*centre(tab, patch, tile=1))
        assert tab.text("#place") == f"patch row {patch // 3}, column {patch % 3}, tile 1, position {13 + patch}"
        assert_panel(tab, variants[0], 13 + patch)


def test_the_command_shows_the_models_own_numbers(
    browser: Browser, cli: Callable[..., Any], tiny: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    picture = pictures[0].resize((90, 60))
    picture.save(tmp_path / "picture.png")
    ran = cli("lens", f"--model={tiny}", "--images=picture.png", "--out=pages", "--top_k=3", "--max_new_tokens=2")
    assert ran.status == 0, ran.err
    backbone = VisionLanguageModel.load(str(tiny))
    inputs = backbone.encode([picture], [CAPTION_PROMPT])
    with torch.inference_mode():
        states = torch.stack(backbone.model(**inputs, output_hidden_states=True).hidden_states)[:, 0]
        # The last of them has passed the norm already.
        states[:-1] = backbone.final_norm(states[:-1])
        p, ids = backbone.unembed(states).float().softmax(dim=-1).topk(TOP)
    visual = (inputs["input_ids"][0] == backbone.model.config.image_token_id).nonzero().flatten().tolist()
    own = replace(make_variant("original", 0), top_ids=ids.numpy(), top_probabilities=p.numpy())
    texts = [backbone.tokenizer.decode([token]) for token in range(len(backbone.vocabulary))]

    index = browser.open(tmp_path / "pages" / "index.html")
    (link,) = index.evaluate("[...document.querySelectorAll('a')].map((one) => one.href)")
    browser.close(index)
    tab = browser.open(Path(link.removeprefix("file://")))
    # The processor cuts the middle out of a wide picture: 8 x 8 patches over 60 x 60 of its pixels.
    for row, column in [(0, 0), (3, 5), (7, 7)]:
        tab.evaluate(f"document.querySelector('canvas').scrollIntoView({{block: {'end' if row > 3 else 'start'!r}}})")
        frame = tab.box("canvas")
        x, y = 15 + 60 * (column + 0.5) / 8, 60 * (row + 0.5) / 8
        tab.move(frame["left"] + frame["width"] * x / 90, frame["top"] + frame["height"] * y / 60)
        position = visual[8 * row + column]
        assert tab.text("#place") == f"patch row {row}, column {column}, position {position}"
        assert_panel(tab, own, position, texts)
    assert tab.errors == []
    browser.close(tab)


def test_a_click_locks_and_another_releases(show: Callable[..., Tab]) -> None:
    tab = show(make_page())
    tab.click(*centre(tab, 5))
    tab.move(*centre(tab, 9))
    assert "position 6" in tab.text("#place")
    assert "locked" in tab.text("#lock")
    tab.click(*centre(tab, 2))
    assert "position 3" in tab.text("#place")
    tab.move(*centre(tab, 9))
    assert "position 10" in tab.text("#place")


def test_keys_do_what_the_mouse_does(show: Callable[..., Tab]) -> None:
    variants = [make_variant("original", 0), make_variant("destination", 1)]
    tab = show(make_page(*variants))
    # The first picture has the focus from the start.
    tab.press(*["ArrowUp"] * 3, *["ArrowLeft"] * 4)
    assert "row 0, column 0, tile 0, position 1" in tab.text("#place")
    tab.press("ArrowDown", "ArrowRight", "ArrowRight")
    assert "row 1, column 2" in tab.text("#place")
    assert_panel(tab, variants[0], 7)
    tab.press("Enter", "ArrowRight")
    assert "row 1, column 2" in tab.text("#place")
    tab.press("v")
    assert_panel(tab, variants[1], 7)
    tab.press("Escape", "ArrowRight")
    assert "row 1, column 3" in tab.text("#place")
    tab.press(" ", "ArrowLeft")
    assert "row 1, column 3" in tab.text("#place")
    tab.press(" ", "t", "ArrowRight", "ArrowDown")
    assert "row 1, column 0, tile 1" in tab.text("#place")
    tab.press("k")
    assert tab.text("#layer-name") == "block 1"
    tab.press("j", "a")
    assert tab.evaluate("document.querySelector('#all').checked")
    tab.press("m")
    assert "decode to nothing" in tab.texts(".counts")[0]
    tab.press("/")
    tab.write("m")
    assert tab.evaluate("document.activeElement.value") == "m"
    tab.press("Escape", "?")
    assert tab.evaluate("document.querySelector('#help').open")
    tab.press("Escape")
    tab.evaluate("document.querySelector('#table').focus()")
    tab.press("ArrowRight", "ArrowUp")
    assert "column 1, tile 1" in tab.text("#place")


@pytest.mark.parametrize("match", ["is", "starts", "contains"])
def test_search_finds_a_word_at_its_layers_and_patches(show: Callable[..., Tab], match: str) -> None:
    variants = [make_variant("original", 0), make_variant("destination", 1)]
    tab = show(make_page(*variants))
    tab.press("/")
    tab.write(" DOG")
    choose(tab, "match", match)
    fitting: dict[str, Callable[[str], bool]] = {
        "is": "dog".__eq__,
        "starts": lambda text: text.startswith("dog"),
        "contains": lambda text: "dog" in text,
    }
    fits = np.array([fitting[match](text.strip().lower()) for text in TEXTS])
    assert 0 < fits.sum() < len(fits)
    for figure, variant in enumerate(variants):
        found = fits[variant.top_ids]
        values = (variant.top_probabilities * found).max(axis=-1)
        for tile in (0, 1):
            tab.evaluate(f"document.querySelector('#tiles').children[{tile}].click()")
            own = of_patches(variant, tile)
            per_layer = found[:, own].any(axis=-1)
            strips = tab.evaluate(
                "[...document.querySelectorAll('.strip')].map(s => [...s.children].map(b => b.dataset.count))"
            )
            assert [int(count) for count in strips[figure]] == per_layer.sum(axis=1).tolist()
            assert (
                f"“dog” at any layer: {per_layer.any(axis=0).sum()} of {len(own)} patches"
                in tab.texts(".counts")[figure]
            )
            drawn = brightness(tab, tile, figure)
            assert drawn.std() > 10
            order = values[:, own].max(axis=0).argsort()
            assert (np.diff(drawn[order]) > -2).all()
    tab.evaluate("document.querySelectorAll('.strip')[0].children[2].click()")
    own = of_patches(variants[0], 1)
    count = fits[variants[0].top_ids][2, own].any(axis=-1).sum()
    assert f"“dog” at block 1: {count} of 6 patches" in tab.texts(".counts")[0]


def choose(tab: Tab, name: str, value: object) -> None:
    """Set a control as somebody would."""
    tab.evaluate(
        f"(one => {{ one.value = {str(value)!r}; for (const kind of ['input', 'change']) "
        f"one.dispatchEvent(new Event(kind, {{bubbles: true}})); }})(document.querySelector('#{name}'))"
    )


def test_masks_patches_that_decode_to_nothing(show: Callable[..., Tab]) -> None:
    variant = make_variant("original", 3)
    tab = show(make_page(variant))
    tab.press("m")
    choose(tab, "overlay", "none")
    word = np.array([re.search(r"[^\W\d_]{2}", text) is not None for text in TEXTS])
    surest = np.where(word[variant.top_ids[..., 0]], variant.top_probabilities[..., 0], -1).max(axis=0)
    seen = set()
    for threshold in (0.1, 0.5, 0.9):
        choose(tab, "threshold", threshold)
        expected = surest[of_patches(variant, 0)] < threshold
        assert (abs(surest - threshold) > 1e-3).all()
        np.testing.assert_array_equal(brightness(tab) == 0, expected)
        assert f"decode to nothing: {expected.sum()} of 12 patches" in tab.text(".counts")
        seen.add(int(expected.sum()))
    assert len(seen) > 1


def distance(one: LensVariant, other: LensVariant, layer: int, position: int) -> float:
    """Total variation of two lists and what each leaves."""
    lists = [
        dict(zip(variant.top_ids[layer, position].tolist(), variant.top_probabilities[layer, position], strict=True))
        for variant in (one, other)
    ]
    tokens = set(lists[0]) | set(lists[1])
    apart = sum(abs(lists[0].get(token, 0) - lists[1].get(token, 0)) for token in tokens)
    rest = abs(sum(lists[0].values()) - sum(lists[1].values()))
    return float(apart + rest) / 2


def test_difference_of_two_models(show: Callable[..., Tab]) -> None:
    first, second, third = (
        make_variant(name, seed) for seed, name in enumerate(("original", "destination", "steered"))
    )
    # The second differs from the first in some lists only.
    ids, p = first.top_ids.copy(), first.top_probabilities.copy()
    ids[1:, 2:7], p[1:, 2:7] = second.top_ids[1:, 2:7], second.top_probabilities[1:, 2:7]
    second = replace(second, top_ids=ids, top_probabilities=p)
    tab = show(make_page(first, second, third), height=1400)
    for pair, layer in [((first, second), None), ((first, second), 2), ((second, third), 1)]:
        for control, variant in zip(("from", "to"), pair, strict=True):
            choose(tab, control, (first, second, third).index(variant))
        if layer is not None:
            choose(tab, "layer", layer)
        own = of_patches(first, 0)
        layers = range(LAYERS) if layer is None else [layer]
        values = np.array([[distance(*pair, one, position) for position in own] for one in layers])
        other = np.array([pair[0].top_ids[one, own, 0] != pair[1].top_ids[one, own, 0] for one in layers])
        assert f"{other.any(axis=0).sum()} of 12 patches" in tab.texts(".counts")[3]
        assert other.any(axis=0).sum() > 0
        listed = tab.texts("#differences li")
        assert tab.text("#differing") == f"Patches with another token: {len(listed)}"
        expected = []
        for patch in np.flatnonzero(other.any(axis=0)):
            row = np.where(other[:, patch], values[:, patch], -1).argmax()
            one = list(layers)[row]
            tokens = [visible(TEXTS[variant.top_ids[one, own[patch], 0]]) for variant in pair]
            name = "embed" if one == 0 else f"block {one - 1}"
            place = f"0: {patch // 4},{patch % 4}"
            expected.append((f"{place} · {name}{tokens[0]} → {tokens[1]}", values[row, patch]))
        expected.sort(key=lambda row: -row[1])
        assert sorted(text[:-5] for text in listed) == sorted(text for text, _ in expected)
        np.testing.assert_allclose([float(text[-5:]) for text in listed], [far for _, far in expected], atol=1e-3)
        order = values.max(axis=0).argsort()
        assert (np.diff(brightness(tab, 0, 3)[order]) > -2).all()
    tab.move(*centre(tab, 4, figure=3))
    shown = [float(row[-1]) for row in panel(tab)[1]]
    np.testing.assert_allclose(shown, [distance(*pair, one, 5) for one in range(LAYERS)], atol=1e-3)
    # Beyond the first token of the answers that differs nothing is compared.
    parts = int((second.token_ids != third.token_ids).argmax())
    assert tab.evaluate("document.querySelector('#table').ariaColCount") == str(parts + 1)
    tab.evaluate("document.querySelector('#differences button').click()")
    assert "locked" in tab.text("#lock")


def test_the_table_scrolls_under_its_headers_and_follows_the_patch(show: Callable[..., Tab]) -> None:
    variant = make_variant("original", 0, answer=200)
    tab = show(make_page(variant), width=900, height=500)
    tab.move(*centre(tab, 11))
    column = tab.evaluate("document.querySelector('.column').getBoundingClientRect().toJSON()")
    frame = tab.box("#table")
    assert frame["left"] < column["left"] < column["right"] <= frame["right"]
    (label,) = tab.evaluate(
        "[...document.querySelectorAll('.head .position')].filter(one => Math.abs(one.getBoundingClientRect().left - "
        f"{column['left']}) < 1).map(one => one.textContent)"
    )
    assert label == "0: 2,3"
    cells = tab.evaluate("document.querySelectorAll('.cell').length")
    assert LAYERS * 3 < cells < LAYERS * 40
    tab.evaluate("document.querySelector('#table').style.maxHeight = '80px'")
    tab.evaluate("document.querySelector('#table').scrollTo(1e6, 1e6)")
    tab.settle()
    head, name = tab.box(".row.head"), tab.box(".row:not(.head) .name")
    frame = tab.box("#table")
    assert head["top"] == frame["top"] + 1
    assert name["left"] == frame["left"] + 1
    last = tab.texts(".head .position")[-1]
    assert last == visible(TEXTS[variant.token_ids[-1]])
    # A cell shows its position, and marks its layer.
    tab.evaluate("document.querySelector('#table').scrollTo(0, 0)")
    tab.evaluate("document.querySelector('#table').style.maxHeight = ''")
    tab.evaluate("document.querySelector('#table').scrollIntoView({block: 'center'})")
    tab.settle()
    frame = tab.box("#table")
    tab.move(frame["left"] + 84 + 86 * 3 + 40, frame["top"] + 26 + 22 * 2 + 11)
    assert "row 0, column 2, tile 0, position 3" in tab.text("#place")
    assert_panel(tab, variant, 3)
    assert "pointed" in row_class(tab, 2)
    assert tab.texts(".row:nth-child(3) .cell")[3] == visible(TEXTS[variant.top_ids[2, 3, 0]])
    cursor = tab.box(".cursor")
    x, y = centre(tab, 2)
    cursor = tab.box(".cursor")
    assert cursor["left"] < x < cursor["right"]
    assert cursor["top"] < y < cursor["bottom"]


def test_text_is_shown_and_never_run(browser: Browser, show: Callable[..., Tab], tmp_path: Path) -> None:
    variants = [replace(make_variant(EVIL, 0), answer=EVILS[1], roles=[EVIL] * 25) for _ in range(2)]
    variants[1] = replace(variants[1], name=EVILS[3], token_ids=variants[0].token_ids)
    page = replace(make_page(*variants), title=EVIL, prompt=EVILS[1], references=EVILS, model=EVIL)
    tab = show(replace(page, layers=[EVIL] * LAYERS))
    choose(tab, "overlay", "tokens")
    tab.press("/")
    tab.write(EVIL)
    tab.press("Escape", "v", "ArrowDown")
    assert tab.text("h1") == EVIL
    assert tab.texts(".said li") == EVILS
    assert tab.texts(".said dd")[1] == EVILS[1]
    assert f"most confident: {EVIL}, " in tab.text("#best")
    assert tab.evaluate("document.querySelectorAll('script').length") == 2
    assert tab.evaluate("document.querySelectorAll('img').length") == 1
    name = f"{EVILS[3].replace('/', '')} #1?100%.html"
    entry = write_page(tmp_path / name, page, TEXTS.__getitem__)
    write_index(tmp_path / "index.html", [entry])
    index = browser.open(tmp_path / "index.html")
    assert index.text("strong") == EVIL
    assert EVILS[1] in index.text("li")
    assert index.evaluate("document.querySelector('a').href") == (tmp_path / name).as_uri()
    assert index.evaluate("ran") == []
    assert index.errors == []
    browser.close(index)


def test_index_narrows_down_and_leads_to_the_pages(browser: Browser, tmp_path: Path) -> None:
    entries = []
    for number, animal in enumerate(("dog", "cat", "Dogfish")):
        page = replace(make_page(), title=f"{number}.jpg", prompt=f"A {animal}?", picture=Image.new("RGB", (9, 900)))
        entries.append(write_page(tmp_path / f"{number}.html", page, TEXTS.__getitem__))
    write_index(tmp_path / "index.html", entries)
    tab = browser.open(tmp_path / "index.html")
    assert tab.texts("strong") == ["0.jpg", "1.jpg", "2.jpg"]
    # The filter has the focus from the start.
    tab.wait("document.activeElement === document.getElementById('filter')")
    tab.write("dog answer")
    assert tab.text("#shown") == "2 of 3"
    assert [box > 0 for box in tab.evaluate("[...document.querySelectorAll('li')].map(one => one.offsetHeight)")] == [
        True,
        False,
        True,
    ]
    tab.press("ArrowDown", "ArrowDown", "Enter")
    tab.wait("document.querySelector('h1')?.textContent === '2.jpg' && document.documentElement.dataset.ready")
    assert tab.errors == []
    browser.close(tab)


@pytest.mark.parametrize("dark", [False, True])
def test_fits_narrow_windows_in_light_and_dark(show: Callable[..., Tab], dark: bool) -> None:
    tab = show(make_page(*(make_variant(name, seed) for seed, name in enumerate("abc"))), width=800, dark=dark)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 800
    # The panel stays in sight beside the pictures.
    assert tab.box(".panel")["top"] < tab.box("canvas")["bottom"]
    assert (np.median(np.asarray(tab.screenshot().convert("L"))) < 128) == dark


def test_without_patches_there_is_the_table_and_the_reason(show: Callable[..., Tab]) -> None:
    variant = make_variant("original", 0)
    tab = show(make_page(variant, grid=False))
    assert tab.text("header .notice:not([hidden])") == "Patches are not shown: every visual token is made of <b>all</b>"
    assert tab.evaluate("document.querySelector('.cursor').hidden")
    tab.press("/")
    tab.write("dog")
    found = np.array([text.strip() == "dog" for text in TEXTS])[variant.top_ids[:, 1:20]].any(axis=(0, 2))
    assert f"“dog” at any layer: {found.sum()} of 19 patches" in tab.text(".counts")
    tab.evaluate("document.querySelector('#table').focus()")
    tab.press("ArrowLeft")
    tab.evaluate("look(views[0], 4)")
    assert tab.text("#place") == "visual token 3, position 4"
    assert_panel(tab, variant, 4)


def test_tokens_beyond_16_bits_are_each_decoded_once(show: Callable[..., Tab]) -> None:
    variant = make_variant("original", 0, visual=6000)
    positions = len(variant.token_ids)
    ids = np.random.default_rng(0).permutation(LAYERS * positions * TOP).reshape(LAYERS, positions, TOP)
    assert ids.max() > 1 << 16
    variant = replace(variant, top_ids=ids)
    decoded: Counter[int] = Counter()

    def decode(token: int) -> str:
        decoded[token] += 1
        return f"t{token}"

    tab = show(make_page(variant), decode)
    assert set(decoded.values()) == {1}
    tab.move(*centre(tab, 3))
    assert_panel(tab, variant, 4, [f"t{token}" for token in range(ids.max() + 1)])


def test_a_large_page_is_small_and_quick(browser: Browser, tmp_path: Path) -> None:
    """32 layers, 600 positions, five random tokens of 32,000 each."""
    random = np.random.default_rng(0)
    layers, positions, top = 32, 600, 5
    ids = random.integers(0, 32_000, (layers, positions, top))
    p = -np.sort(-random.dirichlet([0.4] * (top + 1), (layers, positions))[..., :top]).astype(np.float32)
    index = np.concatenate([np.full(4, -1), np.arange(576), np.full(20, -1)])
    roles = ["image" if one >= 0 else "prompt" for one in index]
    row, column = (axis.flatten() for axis in np.mgrid[:24, :24])
    boxes = np.stack([column, row, column + 1, row + 1], axis=1) * 14
    grid = PatchGrid(*(torch.from_numpy(one) for one in (0 * row, row, column, boxes)))
    noise = Image.fromarray(random.integers(0, 256, (336, 336, 3), dtype=np.uint8))
    page = replace(
        make_page(LensVariant("original", "", ids[0, :, 0], roles, index, ids, p)),
        layers=[f"lm.block.{number}" for number in range(layers)],
        grid=grid,
        picture=noise,
    )
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    texts = ["".join(random.choice(letters, size)) for size in random.integers(2, 10, 32_000)]
    path = tmp_path / "page.html"
    write_page(path, page, texts.__getitem__)
    (picture,) = re.findall(r"data:image/jpeg;base64,[^\"]*", path.read_text())
    assert path.stat().st_size - len(picture) < 1_000_000
    tab = browser.open(path)
    frame = tab.box("canvas")
    tab.move(frame["left"] + 0.5 * frame["width"], frame["top"] + 0.5 * frame["height"])
    tab.settle()
    assert "row 12, column 12" in tab.text("#place")
    # On a machine with nothing else to do, that is the time until it is there.
    assert tab.seconds() < 1
    assert tab.errors == []
    browser.close(tab)
