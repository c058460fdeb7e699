"""The generated data set: reproducible, readable by others, and true of its pictures."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conceptshift.datamodules.shapes import COLORS, KINDS, PLACES, random_scene, write_shapes
from conceptshift.datamodules.shapes.draw import draw_scene
from conceptshift.datamodules.shapes.language import CAPTION_STYLES, questions
from PIL import Image
from pycocotools.coco import COCO

_COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def content(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def instances(shapes: Path) -> dict[int, list[dict[str, Any]]]:
    """Picture id → its instances, read with pycocotools from both files; `kind` and `mask` are added."""
    found: dict[int, list[dict[str, Any]]] = {}
    for folder in ("train2014", "val2014"):
        coco = COCO(shapes / "annotations" / f"instances_{folder}.json")
        for picture in coco.getImgIds():
            rows = coco.loadAnns(coco.getAnnIds(imgIds=picture))
            found[picture] = [
                {**row, "kind": coco.cats[row["category_id"]]["name"], "mask": coco.annToMask(row).astype(bool)}
                for row in rows
            ]
    return found


@pytest.fixture(scope="module")
def pictures(shapes: Path) -> dict[int, dict[str, Any]]:
    return {row["cocoid"]: row for row in content(shapes / "dataset_coco.json")["images"]}


def colors_of(shapes: Path, row: dict[str, Any], things: list[dict[str, Any]]) -> list[str]:
    """The color of each thing, measured in the picture."""
    pixels = np.asarray(Image.open(shapes / row["filepath"] / row["filename"]).convert("RGB")).astype(int)
    return [
        min(COLORS, key=lambda name: float(np.abs(np.median(pixels[thing["mask"]], axis=0) - COLORS[name]).sum()))
        for thing in things
    ]


def counted(phrase: str) -> Counter[str]:
    """`two red circles and a star` → what it counts, by the last word of each part."""
    said: Counter[str] = Counter()
    for number, words in re.findall(r"\b(an?|one|two|three) ((?:\w+ )??\w+)(?=,| and | on | in |$)", phrase):
        plural = _COUNTS[number] > 1
        said[
            words.removesuffix("es")
            if plural and words.endswith("sses")
            else words.removesuffix("s")
            if plural
            else words
        ] = _COUNTS[number]
    return said


def test_same_seed_same_bytes(shapes: Path, tmp_path: Path) -> None:
    again = write_shapes(tmp_path / "again", images=40, seed=0)
    assert digests(again) == digests(shapes)
    other = digests(write_shapes(tmp_path / "other", images=40, seed=1))
    assert other.keys() == digests(shapes).keys()
    assert not set(other.values()) & set(digests(shapes).values())


def test_a_picture_does_not_depend_on_how_many_there_are(shapes: Path, tmp_path: Path) -> None:
    larger = digests(write_shapes(tmp_path / "larger", images=43, seed=0))
    ours = {name: digest for name, digest in digests(shapes).items() if name.endswith(".jpg")}
    assert {name: larger[name] for name in ours} == ours
    assert len([name for name in larger if name.endswith(".jpg")]) == 2 * 43  # in COCO's and in Visual Genome's folders


def test_splits_are_those_of_coco(shapes: Path, pictures: dict[int, dict[str, Any]]) -> None:
    assert Counter(row["split"] for row in pictures.values()) == {"train": 32, "restval": 2, "val": 3, "test": 3}
    for row in pictures.values():
        assert row["filepath"] == ("train2014" if row["split"] == "train" else "val2014")
        with Image.open(shapes / row["filepath"] / row["filename"]) as picture:
            assert (picture.format, picture.size, picture.mode) == ("JPEG", (64, 64), "RGB")
        assert len(row["sentences"]) == len(CAPTION_STYLES)
        assert [sentence["sentid"] for sentence in row["sentences"]] == row["sentids"]


def test_instances_are_masks_that_pycocotools_reads(instances: dict[int, list[dict[str, Any]]]) -> None:
    assert sorted(instances) == list(range(1, 41))
    for things in instances.values():
        assert 1 <= len(things) <= 3
        covered = np.zeros((64, 64), dtype=int)
        for thing in things:
            mask = thing["mask"]
            rows, columns = np.nonzero(mask)
            left, top, width, height = thing["bbox"]
            assert mask.sum() == thing["area"] >= 40
            assert (columns.min(), rows.min()) == (left, top)
            assert (columns.max() + 1 - columns.min(), rows.max() + 1 - rows.min()) == (width, height)
            covered += mask
        assert covered.max() == 1, "things overlap"


def test_captions_are_true(
    shapes: Path, pictures: dict[int, dict[str, Any]], instances: dict[int, list[dict[str, Any]]]
) -> None:
    for picture, row in pictures.items():
        things = instances[picture]
        kinds = Counter(thing["kind"] for thing in things)
        colored = Counter(
            f"{color} {thing['kind']}" for color, thing in zip(colors_of(shapes, row, things), things, strict=True)
        )
        place, mood, color, picture_of, count = (sentence["raw"] for sentence in row["sentences"])
        (where,) = [phrase for phrase in PLACES.values() if place.endswith(f" {phrase}")]
        assert counted(place.removesuffix(f" {where}")) == kinds, place
        assert counted(color) == colored, color
        assert counted(picture_of.split(" picture of ")[1]) == kinds, picture_of
        assert counted(count.removesuffix(f" {where}").replace("shapes", "shape").replace("shape", "shape")) or count
        assert _COUNTS[count.split()[0]] == len(things), count
        assert count.endswith(where)
        assert where.split()[-1] in mood
        assert mood.split()[-2] in picture_of, "both name the same mood"


def test_regions_name_the_thing_in_their_box(
    shapes: Path, pictures: dict[int, dict[str, Any]], instances: dict[int, list[dict[str, Any]]]
) -> None:
    rows = content(shapes / "visual_genome" / "region_descriptions.json")
    assert [row["id"] for row in rows] == sorted(pictures)
    ids = [(row["id"], region["region_id"]) for row in rows for region in row["regions"]]
    assert len(set(ids)) == len(ids)
    for row in rows:
        things = instances[row["id"]]
        colors = colors_of(shapes, pictures[row["id"]], things)
        expected = {(*thing["bbox"], f"{color} {thing['kind']}") for color, thing in zip(colors, things, strict=True)}
        colored = [region for region in row["regions"] if region["phrase"].split()[0] in COLORS]
        assert {(r["x"], r["y"], r["width"], r["height"], r["phrase"]) for r in colored} == expected


@pytest.mark.parametrize("folder", ["train2014", "val2014"])
def test_answers_are_true(folder: str, shapes: Path, instances: dict[int, list[dict[str, Any]]]) -> None:
    asked = content(shapes / f"v2_OpenEnded_mscoco_{folder}_questions.json")["questions"]
    answered = content(shapes / f"v2_mscoco_{folder}_annotations.json")["annotations"]
    assert [row["question_id"] for row in asked] == [row["question_id"] for row in answered]
    checked = 0
    for question, answer in zip(asked, answered, strict=True):
        kinds = Counter(thing["kind"] for thing in instances[question["image_id"]])
        given = [row["answer"] for row in answer["answers"]]
        assert len(given) == 10
        assert Counter(given).most_common(1)[0][0] == answer["multiple_choice_answer"]
        if match := re.fullmatch(r"Is there an? (\w+)\?", question["question"]):
            assert answer["multiple_choice_answer"] == ("yes" if kinds[match[1]] else "no")
        elif match := re.fullmatch(r"How many (\w+) are there\?", question["question"]):
            word = match[1]
            number = (
                sum(kinds.values())
                if word == "shapes"
                else kinds[
                    word
                    if word in KINDS
                    else word.removesuffix("s")
                    if word.removesuffix("s") in KINDS
                    else word.removesuffix("es")
                ]
            )
            assert answer["multiple_choice_answer"] == str(number), question
        else:
            continue
        checked += 1
    assert checked >= 3


def test_yes_and_no_are_balanced() -> None:
    answers: Counter[str] = Counter()
    by_type: dict[str, Counter[str]] = {}
    for seed in range(1500):
        rng = random.Random(seed)
        for question in questions(random_scene(rng), rng):
            answers[question.answer_type] += 1
            if question.answer_type == "yes/no":
                by_type.setdefault(question.question_type, Counter())[question.answer] += 1
            assert question.answer not in question.distractors
    assert answers == {"yes/no": 4500, "number": 1500, "other": 3000}
    for question_type, counts in by_type.items():
        assert set(counts) == {"yes", "no"}
        assert 0.45 < counts["yes"] / counts.total() < 0.55, question_type


@pytest.mark.parametrize("images", [39, 0, -1])
def test_too_few_pictures(images: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--images must be at least 40"):
        write_shapes(tmp_path / "few", images)
    assert not list(tmp_path.iterdir())


def test_a_finished_folder_is_left_alone_and_a_foreign_one_refused(shapes: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in shapes.rglob("*")}
    assert write_shapes(shapes, images=40, seed=0) == shapes
    assert {path: path.stat().st_mtime_ns for path in shapes.rglob("*")} == before
    with pytest.raises(ValueError, match=r"already holds .*'seed': 0"):
        write_shapes(shapes, images=40, seed=1)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="already holds other files"):
        write_shapes(tmp_path, images=40)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def tired(*arguments: Any) -> Any:
        drawn.append(1)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return draw(*arguments)

    draw = draw_scene
    monkeypatch.setattr("conceptshift.datamodules.shapes.files.draw_scene", tired)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "shapes", images=40)
    assert not list(tmp_path.iterdir())
