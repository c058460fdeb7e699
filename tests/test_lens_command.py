"""`conceptshift lens`, and LogitLens in a Trainer: what pages are given, which there are, and what is refused.

What a page shows of it is tested in a browser, in test_lens_page.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conceptshift.callbacks import LogitLens, Steerer, logit_lens
from conceptshift.callbacks.parts.lens_figure import confidence_figure
from conceptshift.callbacks.parts.lens_page import LensPage, LensVariant, write_page
from conceptshift.concepts import SteeringVectors
from conceptshift.datamodules import PicturesDataModule, read_image
from conceptshift.lightning_modules import FeatureExtraction, Inspection, SteeringStep, VisionLanguageModel
from conceptshift.lightning_modules.backbone.logit_lens import LensQuery
from conceptshift.tests.families.crops import CROPS
from conceptshift.tests.families.dynamic import DYNAMIC
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

Run = Callable[..., Any]
Shown = dict[str, LensPage]
NAMES = ["a/one.png", "a/two.JPG", "three.png", "zebra crossing.png"]
PROMPT = "What is it?"
LAYERS = ("lm.embed", "lm.block.0", "lm.block.1", "lm.block.2")
# Four tiles and the whole picture; a resampler; cross-attention.
FAMILIES = {name: {**CROPS, **DYNAMIC}[name] for name in ("idefics3", "qwen2_vl", "idefics2", "mllama")}


@pytest.fixture
def images(tmp_path: Path, pictures: list[Image.Image]) -> Path:
    """Four pictures of different shapes, two of them in a folder of their own, beside what is no picture."""
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    sizes = [(64, 64), (90, 60), (64, 128), (50, 40)]
    for name, picture, size in zip(NAMES, pictures, sizes, strict=False):
        picture.resize(size).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes((folder / "three.png").read_bytes())
    return folder


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """What pages were written of, by title; they are written all the same."""
    given: Shown = {}

    def noted(path: Path, page: LensPage, decode: Callable[[int], str]) -> dict[str, Any]:
        assert page.title not in given, "a page is written once"
        given[page.title] = page
        return write_page(path, page, decode)

    monkeypatch.setattr(logit_lens, "write_page", noted)
    return given


@pytest.fixture
def lens(cli: Run, tiny: Path, images: Path) -> Run:
    """`conceptshift lens` on the tiny model."""

    def run(*more: object, root: Path = images, model: Path = tiny) -> Any:
        options = ("--prompt", PROMPT, "--max_new_tokens=5", "--batch_size=3", "--out=pages")
        return cli("lens", "--model", model, "--images", root, *options, *more)

    return run


class Prepared(Inspection):
    """Inspection of a model that is there already."""

    def __init__(self, backbone: VisionLanguageModel, **options: Any) -> None:
        super().__init__(backbone.source, max_new_tokens=3, **options)
        self.given = [backbone]

    def load(self) -> VisionLanguageModel:
        return self.given[0]


def trainer(*callbacks: Any, **options: Any) -> L.Trainer:
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**off, **options})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in folder.glob("rows-*.jsonl") for line in path.read_text().splitlines()]


def assert_same(one: LensVariant, other: LensVariant) -> None:
    assert one.answer == other.answer
    for name in ("token_ids", "image_index", "top_ids"):
        assert (getattr(one, name) == getattr(other, name)).all()
    assert one.top_probabilities == pytest.approx(other.top_probabilities, abs=1e-6)


def test_pages_have_what_each_model_decodes(
    lens: Run,
    tiny: Path,
    images: Path,
    shown: Shown,
    make_adapter: Run,
    vector: Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Original, destination and steered, of pictures of several shapes in one batch, as each sample alone gives."""
    adapter = make_adapter(tiny, tmp_path / "adapter", scale=0.2)
    SteeringVectors({"lm.block.0": vector}, {}, {}).save(tmp_path / "v.safetensors")
    steering = ("--steering.file", tmp_path / "v.safetensors", "--steering.alpha=3", "--steering.positions=image")
    done = lens("--destination", adapter, *steering, "--top_k=3")
    assert done.status == 0, done.err
    assert "pages/index.html: pages of 4 pictures" in caplog.text
    assert list(shown) == NAMES
    model = VisionLanguageModel.load(str(tiny))
    model.add_destination(str(adapter))
    step = SteeringStep(str(tmp_path / "v.safetensors"), alpha=3.0, positions="image").load()
    for title, page in shown.items():
        picture = read_image(images / title)
        assert page.picture.size == picture.size
        assert (page.prompt, page.references, page.model, page.layers) == (PROMPT, (), str(tiny), LAYERS)
        assert page.grid is not None
        assert len(page.grid.row) == 64
        assert [variant.name for variant in page.variants] == ["original", "destination", "steered"]
        for variant in page.variants:
            inputs = model.encode([picture], [PROMPT])
            name = "original" if variant.name == "steered" else variant.name
            with model.running_as(name), model.intervene(*([step] if variant.name == "steered" else [])):
                alone = model.generate(inputs, 5, lens=LensQuery(LAYERS, 3))
            reading = alone.lens
            assert reading is not None
            assert variant.answer == alone.texts[0]
            assert (variant.token_ids == reading.token_ids.numpy()).all()
            assert (variant.image_index == reading.image_index.numpy()).all()
            assert [role == "image" for role in variant.roles] == (reading.image_index >= 0).tolist()
            assert variant.top_probabilities == pytest.approx(reading.top_probabilities.numpy(), abs=1e-5)
            assert (variant.top_ids == reading.top_ids.numpy()).mean() > 0.99
        first = page.variants[0].top_probabilities
        image = page.variants[0].image_index >= 0
        assert all(abs(first - other.top_probabilities)[:, image].max() > 1e-3 for other in page.variants[1:]
                   if other.top_probabilities.shape == first.shape)  # fmt: skip
    index = Path("pages/index.html").read_text()
    for row in rows_of(Path("pages")):
        assert (Path("pages") / row["entry"]["file"]).is_file()
        assert row["entry"]["file"] in index


def test_a_zero_adapter_changes_no_page(lens: Run, tiny: Path, shown: Shown, make_adapter: Run, tmp_path: Path) -> None:
    done = lens("--destination", make_adapter(tiny, tmp_path / "zero", scale=0), "--limit=2")
    assert done.status == 0, done.err
    assert list(shown) == NAMES[:2]
    for page in shown.values():
        assert_same(*page.variants)


def test_several_destinations_and_some_layers(
    lens: Run, tiny: Path, shown: Shown, make_adapter: Run, tmp_path: Path
) -> None:
    first, second = (make_adapter(tiny, tmp_path / name, scale=0.2, seed=1) for name in ("first", "second"))
    done = lens("--destination", first, "--destination+", second, "--layers=lm.block.*", "--limit=1")
    assert done.status == 0, done.err
    (page,) = shown.values()
    assert [variant.name for variant in page.variants] == ["original", "first", "second"]
    assert page.layers == LAYERS[1:]
    assert_same(*page.variants[1:])  # made from the same seed
    assert page.variants[0].top_ids.shape[::2] == (3, 5)


def test_an_interrupted_run_goes_on(lens: Run, shown: Shown) -> None:
    """A page that is gone is written again, pages that are there are not, and other options are another run."""
    assert lens().status == 0
    before = Path("pages/index.html").read_text()
    pages = {row["sample_id"]: Path("pages") / row["entry"]["file"] for row in rows_of(Path("pages"))}
    contents = {name: page.read_text() for name, page in pages.items()}
    pages[NAMES[2]].unlink()
    Path("pages/index.html").unlink()
    shown.clear()
    assert lens().status == 0
    # And one more, so that there is something to run where nothing is missing.
    assert list(shown) == [NAMES[0], NAMES[2]]
    assert {name: page.read_text() for name, page in pages.items()} == contents
    assert Path("pages/index.html").read_text() == before
    assert "pages: holds another run (`--top_k` was 5, and is 2)" in lens("--top_k=2").error
    shown.clear()
    assert lens("--top_k=2", "--overwrite=true", "--limit=1").status == 0
    assert list(shown) == NAMES[:1]
    assert [page.is_file() for page in pages.values()] == [True, False, False, False]


def test_one_picture_alone(lens: Run, images: Path, shown: Shown) -> None:
    done = lens(root=images / "a" / "two.JPG")
    assert done.status == 0, done.err
    assert list(shown) == ["two.JPG"]


def test_an_unreadable_picture(lens: Run, images: Path, shown: Shown, caplog: pytest.LogCaptureFixture) -> None:
    (images / "a" / "one.png").write_bytes(b"nothing")
    assert "images/a/one.png: not a picture that Pillow can read" in (error := lens().error)
    assert "with --skip_bad_images" in error
    done = lens("--skip_bad_images=true")
    assert done.status == 0, done.err
    assert list(shown) == NAMES[1:]
    assert "pages of 3 pictures, 1 unreadable" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "nowhere"), "nowhere: no such folder or picture; set --images"),
        (("--images", "empty"), "empty: no pictures in this folder; is --images right?"),
        (("--top_k=0",), "--top_k must be at least 1, got 0"),
        (("--top_k=9999",), "`top_k` must be one of 1 …"),
        (("--layers=lm.norm",), "the logit lens reads lm.embed and lm.block.k, not 'lm.norm'"),
        (("--layers=lm.block.9",), "site 'lm.block.9' not found"),
        (("--limit=0",), "--limit must be at least 1"),
        (("--destination", "nowhere"), "'nowhere'"),
        (("--steering.file", "nowhere"), "nowhere must be an artifact file, but there is no such file"),
        (("--dtype=float8",), "--dtype: expected one of"),
    ],
)
def test_bad_input_is_one_line(lens: Run, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    (tmp_path / "empty").mkdir()
    error = lens(*options).error
    assert message in error
    assert "init_args" not in error


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_several_tiles_or_without_places(
    family: str, images: Path, tmp_path: Path, shown: Shown, recwarn: pytest.WarningsRecorder
) -> None:
    model = VisionLanguageModel(*FAMILIES[family](), family)
    data = PicturesDataModule(str(images), PROMPT, batch_size=2)
    run = trainer(LogitLens(str(tmp_path / "pages"), top_k=2))
    if family == "mllama":
        with pytest.raises(
            ValueError, match=r"mllama has no visual tokens for LogitLens to look at: .* cross-attention"
        ):
            run.predict(Prepared(model), data, return_predictions=False)
        return
    run.predict(Prepared(model), data, return_predictions=False)
    assert list(shown) == NAMES
    told = [str(one.message) for one in recwarn if "pages without patches" in str(one.message)]
    for page in shown.values():
        tokens = int((page.variants[0].image_index >= 0).sum())
        if family == "idefics2":
            assert page.grid is None
            assert "made of the whole picture" in page.no_grid
            continue
        assert page.grid is not None
        assert len(page.grid.row) == tokens
        assert len(set(page.grid.tile.tolist())) == (1 if family == "qwen2_vl" else int(page.grid.tile.max()) + 1)
        assert family == "qwen2_vl" or page.grid.tile.max() > 1
    assert len(told) == (family == "idefics2")


def test_names_of_pages_are_safe_and_their_own(tmp_path: Path) -> None:
    ids = ["a/b.jpg", "a_b.jpg", "A_B.jpg", "a\\b", "../../etc/passwd", ".", "..", "", "index", "000000000139",
           "é" * 300, "<script>", "con:", "x" * 300, "x" * 301, "a b", "a\nb", ".hidden", "-rf"]  # fmt: skip
    callback = LogitLens(str(tmp_path))
    pages = [callback._page(sample_id) for sample_id in ids]
    assert {page.parent for page in pages} == {tmp_path}
    assert len({page.name.lower() for page in pages}) == len(ids)
    assert all(page.name[0].isalnum() and len(page.name.encode()) < 100 and page.name.isascii() for page in pages)
    assert callback._page("000000000139").name == "000000000139.html"
    assert all(page.name != "index.html" for page in pages)


def test_tensorboard_has_the_confidence_of_every_variant(
    images: Path, tmp_path: Path, shared_backbone: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def noted(layers: Sequence[str], confidence: Mapping[str, Sequence[float]]) -> Figure:
        drawn.append((layers, confidence))
        return confidence_figure(layers, confidence)

    monkeypatch.setattr(logit_lens, "confidence_figure", noted)
    logger = TensorBoardLogger(str(tmp_path), "logs", "tb")
    data = PicturesDataModule(str(images), PROMPT, batch_size=4)
    trainer(LogitLens(str(tmp_path / "pages")), logger=logger).predict(
        Prepared(shared_backbone), data, return_predictions=False
    )
    whole = EventAccumulator(str(tmp_path / "logs" / "tb"))
    whole.Reload()
    assert whole.Tags()["images"] == ["lens/confidence"]
    ((layers, confidence),) = drawn
    encoded = shared_backbone.encode([read_image(images / name) for name in NAMES], [PROMPT] * 4)
    reading = shared_backbone.generate(encoded, 1, lens=LensQuery(LAYERS, 1, positions="image")).lens
    assert reading is not None
    assert layers == LAYERS
    assert confidence == {"original": pytest.approx(reading.top_probabilities.mean(dim=(1, 2)).tolist(), abs=1e-5)}


def test_what_would_change_what_is_read_is_refused(
    images: Path, tmp_path: Path, tiny: Path, shared_backbone: VisionLanguageModel, vector: Tensor
) -> None:
    SteeringVectors({"lm.block.0": vector}, {}, {}).save(tmp_path / "v.safetensors")
    step = SteeringStep(str(tmp_path / "v.safetensors"))
    data = PicturesDataModule(str(images), PROMPT)
    pages = LogitLens(str(tmp_path / "pages"))
    with pytest.raises(ValueError, match="a Steerer beside it would steer the original, too"):
        trainer(pages, Steerer([step])).predict(Prepared(shared_backbone), data)
    with pytest.raises(ValueError, match=r"two of --trainer\.callbacks want the logit lens"):
        trainer(pages, LogitLens(str(tmp_path / "more"), top_k=2)).predict(Prepared(shared_backbone), data)
    with pytest.raises(TypeError, match="looks into what Inspection runs, got FeatureExtraction"):
        trainer(pages).predict(FeatureExtraction(str(tiny), ["lm.norm"], ["all"]), data)
    with pytest.raises(TypeError, match="needs a data module of pictures"):
        trainer(pages).predict(Prepared(shared_backbone), [torch.zeros(1)])
    with pytest.raises(ValueError, match="'x/steered' would be called 'steered'"):
        Inspection(
            str(tiny), destination=[_touched(tmp_path / name) for name in ("x/steered", "other")], steering=[step]
        )


def _touched(folder: Path) -> str:
    """A folder that could be an adapter."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return os.path.relpath(folder, folder.parents[1])


def test_two_processes_write_the_pages_that_one_writes(lens: Run, tiny: Path, images: Path, tmp_path: Path) -> None:
    """Five pictures, one of them unreadable: the processes have different numbers of them."""
    (images / "b.png").write_bytes(b"nothing")
    data = PicturesDataModule(str(images), PROMPT, batch_size=2, skip_bad_images=True)
    two, one = tmp_path / "two", Path("pages")
    # Forked, so that they need not import everything anew.
    both = trainer(LogitLens(str(two)), strategy="ddp_fork", devices=2)
    both.predict(Inspection(str(tiny), max_new_tokens=5), data, return_predictions=False)
    del os.environ["MASTER_PORT"]
    assert sorted(len(path.read_text().splitlines()) for path in two.glob("rows-*.jsonl")) == [2, 2]
    assert lens("--skip_bad_images=true").status == 0
    assert {path.name for path in two.glob("*.html")} == {path.name for path in one.glob("*.html")}
    assert (two / "index.html").read_text() == (one / "index.html").read_text()
