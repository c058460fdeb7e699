"""LensScorer: what visual tokens decode to, against loops over layers, patches and pixels."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conceptshift.callbacks.parts.class_tokens import class_tokens
from conceptshift.callbacks.parts.lens_scores import background
from conceptshift.datamodules import CAPTION_PROMPT, ObjectDataModule, ObjectNames, read_image
from conceptshift.datamodules.sample import Instance, Sample
from conceptshift.lightning_modules import VisionLanguageModel
from conceptshift.lightning_modules.backbone.heat_map import heat_map, visual_states
from conceptshift.lightning_modules.backbone.patch_grid import PatchGrid
from conceptshift.metrics import bootstrap, ranking_measures, segmentation
from conceptshift.tests.results import measured
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.metrics import average_precision_score, roc_auc_score

Run = Callable[..., Any]
TRAINED = Path(__file__).parents[1] / "checkpoints" / "shapes-llava"
LAYERS = ["lm.embed", *(f"lm.block.{block}" for block in range(6))]
CELL = 8  # pixels of Shapes along a patch of this model


# --- measures -------------------------------------------------------------------------------------------


def test_ranking_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    values = [rng.random(rng.integers(6)).round(1).tolist() for _ in range(60)]  # with ties, and empty samples
    labels = [[bool(rng.random() < value) for value in of_sample] for of_sample in values]
    flat, truth = (np.concatenate(side) for side in (values, labels))
    measures = ranking_measures(values, labels)
    assert measures["auroc"].value == pytest.approx(roc_auc_score(truth, flat))
    assert measures["average_precision"].value == pytest.approx(average_precision_score(truth, flat))
    # A resample is a set of its own.
    drawn = rng.integers(60, size=60)
    flat, truth = (np.concatenate([side[i] for i in drawn]) for side in (values, labels))
    sums = measures["auroc"].statistics[drawn].sum(axis=0)
    assert float(measures["auroc"].score(sums)) == pytest.approx(roc_auc_score(truth, flat))
    assert float(measures["average_precision"].score(sums)) == pytest.approx(average_precision_score(truth, flat))


def test_many_values_are_told_apart_well_enough() -> None:
    rng = np.random.default_rng(1)
    values = rng.random((20, 500)) ** 8
    labels = rng.random((20, 500)) < values
    measures = ranking_measures(values.tolist(), labels.tolist())
    assert measures["auroc"].statistics.shape == (20, 2000)
    assert measures["auroc"].value == pytest.approx(roc_auc_score(labels.ravel(), values.ravel()), abs=1e-3)


@pytest.mark.parametrize("labels", [[[True], [True]], [[False], [False]], [[], []]])
def test_without_both_kinds_there_is_no_ranking(labels: list[list[bool]]) -> None:
    values = [[0.5] * len(of_sample) for of_sample in labels]
    for scored in bootstrap(ranking_measures(values, labels)).values():
        assert np.isnan(scored.score)


def test_maps_are_compared_where_something_is_seen() -> None:
    rng = np.random.default_rng(0)
    heat = rng.random((12, 16)).round(1)
    mask = rng.random((12, 16)) < heat / 2
    heat[:, 13:] = np.nan
    found = segmentation(heat, mask)
    assert found is not None
    values, there = heat[:, :13].ravel(), mask[:, :13].ravel()
    above = values > values.mean()
    assert found.iou == pytest.approx(sum(above & there) / sum(above | there))
    assert found.average_precision == pytest.approx(average_precision_score(there, values))
    assert found.baseline == pytest.approx(there.mean())
    perfect = segmentation(mask[:, :13].astype(float), mask[:, :13])
    assert perfect is not None
    assert perfect[:2] == (1, 1)
    mask[:, :13] = False
    assert segmentation(heat, mask) is None
    with pytest.raises(ValueError, match="of one picture"):
        segmentation(heat, mask[:, :13])


def test_the_end_of_a_row_is_no_background() -> None:
    """Four patches of which the object has one, and after each row a token that covers nothing."""
    patches = torch.tensor([True, True, False] * 2)
    row, column = torch.tensor([0, 0, -1, 1, 1, -1]), torch.tensor([0, 1, -1] * 2)
    boxes = 8.0 * torch.stack([column, row, column + 1, row + 1], dim=1) * patches[:, None]
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:8, 8:] = 1
    sample = Sample("1", Path("1.jpg"), "", "", instances=(Instance("dog", coco_mask.encode(np.asfortranarray(mask))),))
    grid = PatchGrid(torch.where(patches, 0, -1), row, column, boxes)
    assert background(sample, grid).tolist() == [True, False, False, True, True, False]


# --- tokens ---------------------------------------------------------------------------------------------

PIECES = ["<s>", " ", *"abcdefghijklmnopqrstuvwxyz", "dog", " dog", " Dog", " hot", " traf", "traf", "tr", " light"]
PIECES += [" bat", " base", " ball", "TV", " tv", "DOG", " ele", "mo", " sofa", " house"]


class Pieces:
    """A tokenizer that takes the longest piece it has."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        found = []
        while text:
            # What is not there is a special token.
            piece = max((piece for piece in PIECES if text.startswith(piece)), key=len, default="<s>")
            found.append(PIECES.index(piece))
            text = text[len(piece) if piece != "<s>" else 1 :]
        return found


def tokens_of(names: ObjectNames) -> dict[str, tuple[set[str], set[str]]]:
    backbone: Any = SimpleNamespace(tokenizer=Pieces(), vocabulary=["", *PIECES[1:]])
    return {
        name: ({PIECES[token] for token in found.strict}, {PIECES[token] for token in found.lenient})
        for name, found in class_tokens(backbone, names).items()
    }


def test_tokens_of_a_class_begin_its_name_and_no_other() -> None:
    names = ObjectNames(
        {
            "dog": [],
            "hot dog": [],
            "traffic light": [],
            "baseball bat": ["bat"],
            "baseball glove": [],
            "tv": [],
            "elephant": [],
            "moon": [],
            "couch": ["sofa", "tree house"],
            "person": ["batter"],
        }
    )
    found = tokens_of(names)
    assert found["dog"] == ({"dog", " dog", " Dog", "DOG"},) * 2  # not of hot dog, though it begins a word of it
    assert found["hot dog"] == ({" hot"},) * 2
    assert found["traffic light"] == ({"traf", " traf", " light"},) * 2  # "tr" has too few letters
    assert found["baseball bat"] == ({" bat"},) * 2  # " base" begins two classes; "batter" begins as all of "bat"
    assert found["baseball glove"] == (set(), set())
    assert found["person"] == (set(), set())
    assert found["tv"] == ({"TV", " tv"},) * 2
    assert found["elephant"] == ({" ele"},) * 2
    assert found["moon"] == (set(), set())
    assert found["couch"] == (set(), {" sofa"})  # of a synonym of several words none counts


# --- a run ----------------------------------------------------------------------------------------------


@pytest.fixture
def score(cli: Run, shapes: Path) -> Run:
    """Score the embedded model on pictures of Shapes: `score(out, *more, settings=[…])`."""

    def run(
        out: Path,
        *more: object,
        settings: Sequence[str] = ("generative",),
        model: Path = TRAINED,
        root: Path = shapes,
    ) -> Any:
        return cli("predict", *arguments(out, root, settings, model), *more)

    return run


def arguments(out: Path, root: Path, settings: Sequence[str] = ("generative",), model: Path = TRAINED) -> list[str]:
    return [
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.logger=false",
        "--model=Inspection",
        f"--model.model_id={model}",
        "--data=ObjectDataModule",
        f"--data.root={root}",
        "--data.predict_split=train2014",
        f"--data.settings={json.dumps(settings)}",
        "--data.limit=9",
        "--data.batch_size=4",
        "--trainer.callbacks+=LensScorer",
        f"--trainer.callbacks.out={out}",
    ]


def result(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "lens.json").read_text())
    return content


def test_scores_are_those_of_loops(score: Run, shapes: Path, tmp_path: Path) -> None:
    done = score(tmp_path / "lens")
    assert done.status == 0, done.err
    content = result(tmp_path / "lens")
    found = content["variants"]["original"]
    assert content["layers"] == LAYERS
    assert (content["left_out"], content["skipped"]) == ({}, {})

    data = ObjectDataModule(str(shapes), ["generative"], predict_split="train2014", limit=9)
    data.setup("predict")
    backbone = VisionLanguageModel.load(str(TRAINED))
    own = {name: class_words(backbone, name) for name in data.names.categories}
    strict: list[list[float]] = []
    background: list[list[float]] = []
    confidence: list[float] = []
    there: list[bool] = []
    maps = []
    for sample in {sample.image: sample for sample in data.samples("predict")}.values():
        picture = read_image(sample.image)
        layers = []
        for layer in LAYERS:
            (states,) = visual_states(backbone, [picture], [CAPTION_PROMPT], layer)
            with torch.inference_mode():
                layers.append(backbone.unembed(backbone.final_norm(states)).float().softmax(dim=-1))
        probabilities = torch.stack(layers)
        top = probabilities.argmax(dim=-1)
        masks: dict[str, Any] = {}
        for one in sample.instances:
            masks[one.category] = masks.get(one.category, False) | one.mask()
        outside = [share == 0 for share in patches(np.logical_or.reduce(list(masks.values())))]
        for name, tokens in own.items():
            most = probabilities[:, :, tokens].amax(dim=(0, 2))
            confidence.append(float(most.max()))
            there.append(name in masks)
            if name in masks:
                inside = [share >= 0.5 for share in patches(masks[name])]
                for chosen, shares in ((inside, strict), (outside, background)):
                    says = [
                        [int(token) in tokens for token, is_in in zip(row, chosen, strict=True) if is_in] for row in top
                    ]
                    shares.append([sum(row) / len(row) for row in says])
                heat = heat_map(most[None], backbone.patch_grid(*picture.size), picture.size)[0].numpy()
                maps.append(average_precision_score(masks[name].ravel(), heat.ravel()))
    of_objects = np.mean(strict, axis=0)
    assert of_objects.max() > 0.05  # or nothing is tested
    assert [one["share"] for one in found["strict"]] == pytest.approx(of_objects.tolist())
    assert [one["share"] for one in found["any"]] == pytest.approx((np.array(strict) > 0).mean(axis=0).tolist())
    assert [one["share"] for one in found["background"]] == pytest.approx(np.mean(background, axis=0).tolist())
    assert found["best"]["layer"] == LAYERS[int(of_objects.argmax())]
    peaks = [row.index(max(row)) for row in strict if any(row)]
    assert found["peak_layer"]["layer"] == pytest.approx(np.mean(peaks))
    assert found["segmentation"]["average_precision"]["mean"] == pytest.approx(np.mean(maps), abs=1e-4)
    assert found["presence"]["auroc"]["value"] == pytest.approx(roc_auc_score(there, confidence), abs=1e-6)
    assert (found["presence"]["present"], found["presence"]["absent"]) == (sum(there), len(there) - sum(there))
    assert (found["pictures"], found["objects"]) == (9, sum(there))
    low, high = found["best"]["interval"]
    assert low < found["best"]["share"] < high
    rows = pq.read_table(tmp_path / "lens" / "samples.parquet").to_pylist()
    assert len(rows) == found["objects"]
    assert (tmp_path / "lens" / "figures" / "lens_score.png").stat().st_size > 5_000


def class_words(backbone: VisionLanguageModel, name: str) -> list[int]:
    """The tokens that are a name or its plural."""
    forms = {name, f"{name}s", f"{name}es"}
    return [token for token, text in enumerate(backbone.vocabulary) if text.strip().lower() in forms]


def patches(mask: Any) -> list[float]:
    """Share of each patch that a mask covers."""
    height, width = mask.shape
    return [
        float(mask[top : top + CELL, left : left + CELL].mean())
        for top in range(0, height, CELL)
        for left in range(0, width, CELL)
    ]


def test_a_picture_is_read_once_whatever_is_asked_about_it(score: Run, tmp_path: Path) -> None:
    assert score(tmp_path / "one").status == 0
    done = score(tmp_path / "all", "--data.batch_size=7", settings=["polling", "generative", "vqa"])
    assert done.status == 0, done.err
    one, other = (result(tmp_path / name) for name in ("one", "all"))
    assert one["variants"] == other["variants"]
    lines = (tmp_path / "all" / "rows-00000.jsonl").read_text().splitlines()
    assert len(lines) == 9
    assert all(json.loads(line)["sample_id"].startswith("generative/") for line in lines)
    # Without captions there is nothing that they could invent.
    assert score(tmp_path / "polled", settings=["polling"]).status == 0
    polled = result(tmp_path / "polled")["variants"]["original"]
    assert (polled["chair"], polled["confidence"]) == (None, None)
    assert polled["strict"] == one["variants"]["original"]["strict"]


def test_captions_are_compared_with_instances_and_references(score: Run, shapes: Path, tmp_path: Path) -> None:
    """A ring without a mask is there as long as a reference names it."""
    root = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    path = root / "annotations" / "instances_train2014.json"
    content = json.loads(path.read_text())
    gone = next(row["id"] for row in content["categories"] if row["name"] == "ring")
    content["annotations"] = [row for row in content["annotations"] if row["category_id"] != gone]
    path.write_text(json.dumps(content))
    invented = {}
    for name in ("with", "without"):
        done = score(tmp_path / name, "--data.limit=25", root=root)
        assert done.status == 0, done.err
        found = result(tmp_path / name)["variants"]["original"]
        rows = map(json.loads, (tmp_path / name / "rows-00000.jsonl").read_text().splitlines())
        named = [(name, name in row["there"]) for row in rows for name in row["variants"]["original"]["named"]]
        invented[name] = [one for one, is_there in named if not is_there]
        assert found["chair"]["chair_i"]["value"] == pytest.approx(len(invented[name]) / len(named))
        counts = found["confidence"]["named"], found["confidence"]["hallucinated"]
        assert counts == (len(named), len(invented[name]))
        (root / "dataset_coco.json").unlink(missing_ok=True)
    assert "ring" in invented["without"]
    assert "ring" not in invented["with"]
    assert 0 <= found["confidence"]["auroc"]["value"] <= 1


def test_an_interrupted_run_goes_on(score: Run, tmp_path: Path) -> None:
    assert score(tmp_path / "lens").status == 0
    whole = measured(tmp_path / "lens" / "lens.json")
    rows = tmp_path / "lens" / "rows-00000.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:5]) + lines[5][:40])
    done = score(tmp_path / "lens")
    assert done.status == 0, done.err
    assert measured(tmp_path / "lens" / "lens.json") == whole
    assert "holds another run" in score(tmp_path / "lens", "--data.limit=3").error


def test_two_processes_find_what_one_finds(score: Run, tiny: Path, tmp_path: Path) -> None:
    """With a model that has no token for some classes, whose objects are left out."""
    assert score(tmp_path / "one", model=tiny).status == 0
    # Forked, so that they need not import everything anew.
    assert score(tmp_path / "two", "--trainer.strategy=ddp_fork", "--trainer.devices=2", model=tiny).status == 0
    del os.environ["MASTER_PORT"]
    assert (tmp_path / "two" / "rows-00001.jsonl").is_file()
    one, two = (result(tmp_path / name) for name in ("one", "two"))
    assert two["left_out"] == one["left_out"] != {}
    assert two["variants"].keys() == one["variants"].keys()
    for key, value in one["variants"]["original"].items():
        assert two["variants"]["original"][key] == value, key


def test_what_cannot_be_scored_is_refused(score: Run, cli: Run, tiny: Path, shapes: Path, tmp_path: Path) -> None:
    other = ["--model=FeatureExtraction", "--model.sites=[lm.embed]", "--model.selectors=[image]"]
    given = arguments(tmp_path / "lens", shapes, model=tiny)
    chosen = [one for one in given if one != "--model=Inspection"]
    assert "LensScorer looks into what Inspection runs" in cli("predict", *other, *chosen).error
    captions = [one for one in given if "--data=" not in one and "settings" not in one and "split" not in one]
    assert "--data ObjectDataModule" in cli("predict", "--data=CaptionDataModule", *captions).error


def test_objects_must_be_as_large_as_a_patch_and_masks_of_their_picture(
    score: Run, shapes: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    path = root / "annotations" / "instances_train2014.json"
    content = json.loads(path.read_text())
    corner = [[0.0, 0.0, 3.0, 0.0, 3.0, 3.0, 0.0, 3.0]]
    content["annotations"][0]["segmentation"] = corner
    path.write_text(json.dumps(content))
    error = score(tmp_path / "lens", root=root).error
    assert "pixels, less than a patch" in error
    assert "--data.init_args.least_area" in error
    shutil.copyfile(shapes / "annotations" / path.name, path)
    for picture in (root / "train2014").iterdir():
        Image.open(picture).resize((32, 32)).save(picture)
    assert "32 x 32 pixels, but the masks of its objects have 64 x 64" in score(tmp_path / "lens", root=root).error
