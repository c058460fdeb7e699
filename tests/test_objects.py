"""Objects in pictures: which samples there are, and their masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conceptshift.datamodules import ObjectDataModule
from conceptshift.datamodules.instances import InstanceFile
from conceptshift.datamodules.object_names import with_article
from conceptshift.datamodules.sample import Sample
from PIL import Image, ImageDraw

HEIGHT, WIDTH = 40, 60


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def run_lengths(mask: np.ndarray[Any, Any]) -> list[int]:
    """By hand: down the columns, from zeros on."""
    counts, current = [0], 0
    for pixel in mask.T.flatten().tolist():
        if pixel != current:
            counts.append(0)
            current = pixel
        counts[-1] += 1
    return counts


CROWD = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
CROWD[5:25, 30:50] = 1

ANNOTATIONS = [
    {"image_id": 1, "category_id": 18, "iscrowd": 0, "segmentation": box(0, 0, 20, 20)},
    {"image_id": 1, "category_id": 18, "iscrowd": 0, "segmentation": box(10, 0, 30, 20)},
    {"image_id": 1, "category_id": 58, "iscrowd": 0, "segmentation": box(40, 30, 41, 31)},
    {
        "image_id": 1,
        "category_id": 1,
        "iscrowd": 1,
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": run_lengths(CROWD)},
    },
    {"image_id": 3, "category_id": 58, "iscrowd": 0, "segmentation": [*box(0, 0, 10, 10), *box(20, 20, 30, 30)]},
]
INSTANCES: dict[str, Any] = {
    "images": [
        {"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg", "height": HEIGHT, "width": WIDTH}
        for number in (1, 2, 3)
    ],
    "annotations": [{"id": number, **row} for number, row in enumerate(ANNOTATIONS)],
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 58, "name": "hot dog"}],
}
QUESTIONS = [
    (10, 1, "What color is the puppy?", "brown"),
    (11, 1, "What animal is it?", "dog"),
    (12, 1, "Is the man near the dog?", "yes"),
    (13, 1, "Is the dog near the zebra?", "no"),
    (14, 1, "What is the man wearing?", "hat"),
    (15, 3, "Are these hot dogs?", "yes"),
    (16, 3, "Is it sunny?", "yes"),
]
CAPTIONS = [{"filename": "COCO_val2014_000000000001.jpg", "sentences": [{"raw": "A  dog.\n"}, {"raw": "A man."}]}]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "annotations/instances_val2014.json", INSTANCES)
    questions = [{"question_id": q, "image_id": i, "question": text} for q, i, text, _ in QUESTIONS]
    answers = [
        {
            "question_id": q,
            "multiple_choice_answer": answer,
            "answers": [{"answer": answer}] * 10,
            "answer_type": "other",
            "question_type": "what",
        }
        for q, _, _, answer in QUESTIONS
    ]
    write(tmp_path, "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(tmp_path, "v2_mscoco_val2014_annotations.json", {"annotations": answers})
    write(tmp_path, "dataset_coco.json", {"images": CAPTIONS})
    return tmp_path


def write(root: Path, name: str, content: Any) -> None:
    path = root / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def changed(root: Path, number: int, **change: Any) -> None:
    """Change one object."""
    rows = [{**row, **(change if row["id"] == number else {})} for row in INSTANCES["annotations"]]
    write(root, "annotations/instances_val2014.json", {**INSTANCES, "annotations": rows})


def samples(root: Path, **options: Any) -> list[Sample]:
    data = ObjectDataModule(str(root), **options)
    data.setup("predict")
    return data.samples("predict")


def test_objects_are_samples_in_every_setting(root: Path) -> None:
    found = samples(root)
    assert [sample.sample_id for sample in found] == [
        "generative/1/dog",
        "polling/1/dog",
        "vqa/10",
        "vqa/11",
        "vqa/13",
        "generative/3/hot dog",
        "polling/3/hot dog",
        "vqa/15",
    ]
    for sample in found:
        assert sample.setting == sample.sample_id.split("/")[0]
        assert sample.object == ("dog" if "01.jpg" in sample.image.name else "hot dog")
    described, polled, asked = found[:3]
    assert described.references == ("A dog.", "A man.")
    assert described.target == "dog"
    assert polled.prompt.startswith("Is there a dog in the image?\nAnswer")
    assert (polled.target, polled.answers, polled.answer_type) == ("yes", ("yes",) * 10, "yes/no")
    assert asked.prompt.startswith("What color is the puppy?\nAnswer")
    assert (asked.target, asked.answers) == ("brown", ("brown",) * 10)
    assert [one.category for one in asked.instances] == ["dog", "dog", "hot dog", "person"]


def test_areas_are_of_all_objects_of_a_class_together(root: Path) -> None:
    (dogs,) = samples(root, settings=["polling"], categories=["dog"])
    both = np.logical_or.reduce([one.mask() for one in dogs.instances if one.category == "dog"])
    share = both.mean()
    assert share == pytest.approx(30 * 20 / (HEIGHT * WIDTH), abs=0.02)
    assert len(samples(root, settings=["polling"], categories=["dog"], least_area=share - 1e-6)) == 1
    assert len(samples(root, settings=["polling"], categories=["dog"], most_area=share + 1e-6)) == 1
    for option in ({"least_area": share + 1e-6}, {"most_area": share - 1e-6}):
        with pytest.raises(ValueError, match="no picture has what is asked for"):
            samples(root, settings=["polling"], categories=["dog"], **option)
    # One pixel of a hot dog is enough, once it is asked for.
    tiny = samples(root, settings=["polling"], least_area=0)
    assert [sample.sample_id for sample in tiny] == ["polling/1/dog", "polling/1/hot dog", "polling/3/hot dog"]


def test_masks_are_those_that_pillow_draws(root: Path) -> None:
    pictures = list(InstanceFile(root / "annotations" / "instances_val2014.json").pictures())
    assert [len(picture.instances) for picture in pictures] == [4, 0, 1]
    assert [picture.crowds for picture in pictures] == [{"person"}, frozenset(), frozenset()]
    assert np.array_equal(pictures[0].instances[3].mask(), CROWD.astype(bool))
    drawn = Image.new("1", (WIDTH, HEIGHT))
    for left, top in ((0, 0), (20, 20)):
        ImageDraw.Draw(drawn).rectangle((left, top, left + 9, top + 9), fill=1)
    assert np.array_equal(pictures[2].instances[0].mask(), np.asarray(drawn))


def test_limit_counts_pictures(root: Path) -> None:
    assert {sample.image.name for sample in samples(root, limit=1)} == {"COCO_val2014_000000000001.jpg"}
    assert len(samples(root, limit=1)) == 5
    assert len(samples(root, limit=2)) == len(samples(root)) == 8
    assert len(samples(root, limit=1, predict_split="val2014+val2014")) == 2 * 5


def test_only_what_a_setting_needs_is_read(root: Path) -> None:
    for file in root.glob("*.json"):
        file.unlink()
    described = samples(root, settings=["generative", "polling"])
    assert [sample.references for sample in described] == [()] * 4
    with pytest.raises(FileNotFoundError, match=r"leave `vqa` out of --data\.init_args\.settings"):
        samples(root)


def test_shapes_are_objects(shapes: Path) -> None:
    found = samples(shapes, polling_prompt="Is there {object}?")
    asked = [sample for sample in found if sample.setting == "vqa"]
    assert {sample.setting for sample in found} == {"generative", "polling", "vqa"}
    assert len({sample.sample_id for sample in found}) == len(found)
    for sample in found:
        assert sample.object in {one.category for one in sample.instances}
        with Image.open(sample.image) as picture:
            assert {one.mask().shape for one in sample.instances} == {(picture.height, picture.width)}
    for sample in asked:
        assert sample.object in sample.prompt or sample.object == sample.target
    asked_about = {sample.prompt for sample in found if sample.setting == "polling"}
    assert asked_about >= {f"Is there {with_article(sample.object)}?" for sample in found}


def test_names_are_of_all_classes(root: Path) -> None:
    data = ObjectDataModule(str(root), categories=["dog"])
    data.setup("predict")
    assert data.names.named("a man, a puppy and hot dogs") == ["person", "dog", "hot dog"]
    assert data.describe("predict")["categories"] == ["dog"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"categories": ["cat"]}, "no 'cat'; .* has person, dog, hot dog"),
        ({"settings": ["quiz"]}, "some of generative, polling, vqa, got .*quiz"),
        ({"settings": []}, "some of generative"),
        ({"least_area": 0.5, "most_area": 0.1}, "shares of a picture"),
        ({"polling_prompt": "Is there one?"}, "write {object}"),
        ({"limit": 0}, "limit must be at least 1"),
    ],
)
def test_wrong_options_are_refused(root: Path, options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error) as raised:
        samples(root, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"category_id": 99}, "picture 1 lacks 99"),
        ({"segmentation": []}, "picture 1: object 0 has no mask"),
        ({"segmentation": {"size": [HEIGHT, 2], "counts": "0"}}, "picture 1: object 0 has a mask of"),
        ({"image_id": 99}, "an entry lacks 99"),
    ],
)
def test_wrong_files_are_refused(root: Path, change: dict[str, Any], error: str) -> None:
    changed(root, 0, **change)
    with pytest.raises(ValueError, match=error) as raised:
        samples(root)
    assert "instances_val2014.json" in str(raised.value)
