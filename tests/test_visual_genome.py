"""Visual Genome's regions: what is a sample, how pictures are split, and that the file is read piece by piece."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conceptshift.datamodules import VisualGenomeDataModule, read_image, visual_genome
from conceptshift.datamodules.sample import Sample
from conceptshift.datamodules.stored_features import held_out_ids
from conceptshift.datamodules.visual_genome import _entries, split_of
from conceptshift.datamodules.word_classes import WORD_CLASSES
from PIL import Image


def of_split(split: str, count: int) -> list[int]:
    """The first picture ids of a split."""
    return list(itertools.islice((number for number in itertools.count(1) if split_of(number) == split), count))


FIRST, SECOND, THIRD, EMPTY = of_split("train", 4)
VAL, OTHER_VAL = of_split("val", 2)
(TEST,) = of_split("test", 1)


def entry(picture: int, *phrases: str, **changes: Any) -> dict[str, Any]:
    regions = [
        {"region_id": 1000 * picture + number, "image_id": picture, "phrase": phrase, "x": 1, "y": 2, "width": 3,
         "height": 4}
        for number, phrase in enumerate(phrases)
    ]  # fmt: skip
    return {"regions": regions, "id": picture, **changes}


ENTRIES = [
    entry(FIRST, "a Red  ball.", "the floor", "", "redness"),
    entry(VAL, "the sky", "a blue\nsky", "a hot-dog on a plate"),
    entry(SECOND, "blue-green water", "A dog"),
    entry(EMPTY, "", " "),
    entry(TEST, "a dog"),
    entry(THIRD, "hotdog"),
    entry(OTHER_VAL, "grass"),
]


def write(root: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "region_descriptions.json").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, row in enumerate(ENTRIES):
        folder = tmp_path / ("VG_100K", "VG_100K_2")[number % 2]
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (30 * number, 0, 0)).save(folder / f"{row['id']}.jpg")
    return write(tmp_path, ENTRIES)


def samples(root: Path, stage: str, **options: Any) -> list[Sample]:
    data = VisualGenomeDataModule(str(root), **options)
    data.setup(stage)
    return data.samples(stage)


def test_every_phrase_is_learned(root: Path) -> None:
    found = samples(root, "fit", prompt="Say.")
    assert [(sample.sample_id, sample.target) for sample in found] == [
        (f"{FIRST}#{1000 * FIRST}", "a Red ball."),
        (f"{FIRST}#{1000 * FIRST + 1}", "the floor"),
        (f"{FIRST}#{1000 * FIRST + 3}", "redness"),
        (f"{SECOND}#{1000 * SECOND}", "blue-green water"),
        (f"{SECOND}#{1000 * SECOND + 1}", "A dog"),
        (f"{THIRD}#{1000 * THIRD}", "hotdog"),
    ]
    assert {sample.prompt for sample in found} == {"Say."}


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_every_picture_is_described_once(root: Path, stage: str) -> None:
    found = samples(root, stage)
    assert [(sample.sample_id, sample.target) for sample in found] == [(str(VAL), "the sky"), (str(OTHER_VAL), "grass")]
    assert found[0].references == ("the sky", "a blue sky", "a hot-dog on a plate")


def test_pictures_lie_in_two_folders(root: Path) -> None:
    found = samples(root, "predict", predict_split="train+val+test")
    assert len(found) == 6  # none for the picture without a phrase
    assert Counter(sample.image.parent.name for sample in found) == {"VG_100K": 4, "VG_100K_2": 2}
    for sample in found:
        number = [row["id"] for row in ENTRIES].index(int(sample.sample_id))
        pixel = read_image(sample.image).getpixel((0, 0))
        assert isinstance(pixel, tuple)
        assert abs(pixel[0] - 30 * number) < 4


def test_words_filter_what_is_learned_and_choose_the_target(root: Path) -> None:
    learned = samples(root, "fit", caption_words="colors")
    assert [sample.target for sample in learned] == ["a Red ball.", "blue-green water"]
    assert [sample.target for sample in samples(root, "fit", reference_words=["DOG"])] == ["blue-green water", "A dog"]
    both = samples(root, "fit", reference_words=["dog"], caption_words=["water"])
    assert [sample.target for sample in both] == ["blue-green water"]
    shown = samples(root, "validate", caption_words="colors")
    assert [sample.target for sample in shown] == ["a blue sky", "grass"]
    assert len(shown[0].references) == 3
    named = samples(root, "predict", caption_words="colors", reference_words=["plate"])
    assert [(sample.sample_id, sample.target) for sample in named] == [(str(VAL), "a hot-dog on a plate")]


def test_a_limit_keeps_the_first_ones(root: Path) -> None:
    everything = samples(root, "fit")
    assert samples(root, "fit", limit=4) == everything[:4]
    assert len(samples(root, "predict", predict_split="val+train", limit=3)) == 3


# --- splits ---------------------------------------------------------------------------------------------


def test_a_picture_is_in_one_split_whatever_else_there_is(root: Path) -> None:
    ids = [{sample.sample_id for sample in samples(root, "predict", predict_split=split)} for split in ("train", "val")]
    assert not ids[0] & ids[1]
    write(root, [row for row in reversed(ENTRIES) if row["id"] != FIRST])
    assert {sample.sample_id for sample in samples(root, "predict")} == ids[1]


def test_shares_are_as_documented() -> None:
    found = Counter(split_of(number) for number in range(2_300_000, 2_340_000))
    for split, share in (("train", 0.9), ("val", 0.05), ("test", 0.05)):
        assert found[split] / 40_000 == pytest.approx(share, abs=0.005)


def test_splits_do_not_depend_on_the_hash_that_dictionaries_hold_out_by() -> None:
    """With the same hash, `held_out: 0.2` would hold out no picture of `val`."""
    val = [str(number) for number in range(40_000) if split_of(number) == "val"]
    assert len(held_out_ids(val, 0.2)) / len(val) == pytest.approx(0.2, abs=0.04)


def test_unknown_splits(root: Path) -> None:
    with pytest.raises(ValueError, match="no split 'val2014'; Visual Genome is split into train, val, test"):
        samples(root, "predict", predict_split="val2014")


# --- reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2, 7, 64, 10_000])
@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_pieces_give_what_the_whole_file_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, layout: dict[str, Any]
) -> None:
    rows = [*ENTRIES, entry(9, 'a "quoted" [bracket], {brace} \\ and \u00e9\U0001f600')]
    monkeypatch.setattr(visual_genome, "_CHUNK", chunk)
    write(tmp_path, f" {json.dumps(rows, **layout)}\n")
    assert list(_entries(tmp_path / "region_descriptions.json")) == rows


def test_what_is_not_wanted_takes_no_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visual_genome, "_CHUNK", 2**16)
    write(root, [entry(number, *(f"thing {number} {part}" for part in range(50))) for number in range(400)])
    path = root / "region_descriptions.json"

    def peak(work: Callable[[], object]) -> int:
        tracemalloc.start()
        work()
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    data = VisualGenomeDataModule(str(root), caption_words=["nothing"])
    assert peak(lambda: data.read("train", training=True)) < 0.1 * peak(lambda: json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a list of pictures"),
        ('{"images": []}', "expected a list of pictures"),
        (json.dumps(ENTRIES)[:-40], "malformed JSON"),
        (json.dumps(ENTRIES)[:-1], "malformed JSON"),
        (json.dumps(ENTRIES).replace("grass", 'gr"ass'), "malformed JSON"),
        ([{"regions": []}], "lacks 'id'"),
        ([{"id": "abc", "regions": []}], "is this Visual Genome's"),
        ([{"id": VAL}], "lacks 'regions'"),
        ([{"id": VAL, "regions": [{"phrase": "x"}]}], "lacks 'region_id'"),
        ([{"id": VAL, "regions": [{"phrase": None, "region_id": 1}]}], "is this Visual Genome's"),
        ([1, 2], "is this Visual Genome's"),
        ([], "no samples for `predict`"),
    ],
)
def test_unusable_files(root: Path, content: Any, message: str) -> None:
    write(root, content)
    with pytest.raises(ValueError, match=message) as caught:
        samples(root, "predict")
    assert str(root) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_no_text(root: Path) -> None:
    (root / "region_descriptions.json").write_bytes(b"[\xff\xfe")
    with pytest.raises(ValueError, match=r"region_descriptions\.json: malformed JSON"):
        samples(root, "predict")


def test_missing_files(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such data folder; set --data\.init_args\.root"):
        samples(tmp_path / "nowhere", "predict")
    with pytest.raises(FileNotFoundError, match="neither VG_100K nor VG_100K_2 is there"):
        samples(root / "VG_100K", "predict")
    (root / "region_descriptions.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"region_descriptions\.json: no such annotation file"):
        samples(root, "predict")


def test_the_description_tells_any_two_runs_with_other_samples_apart(root: Path) -> None:
    options: list[dict[str, Any]] = [
        {}, {"prompt": "Say."}, {"predict_split": "test"}, {"limit": 1}, {"reference_words": ["dog"]},
        {"caption_words": ["dog"]},
    ]  # fmt: skip
    described = [json.dumps(VisualGenomeDataModule(str(root), **some).describe("predict")) for some in options]
    assert len(set(described)) == len(options)


# --- Shapes ---------------------------------------------------------------------------------------------


def test_shapes_are_read_too(shapes: Path) -> None:
    root = shapes / "visual_genome"
    learned = samples(root, "fit", train_split="train+val+test", caption_words="colors")
    assert len(learned) >= 40
    assert all(WORD_CLASSES["colors"] & set(sample.target.split()) for sample in learned)
    pictures = samples(root, "predict", predict_split="train+val+test")
    assert sorted(int(sample.sample_id) for sample in pictures) == list(range(1, 41))
    for sample in pictures:
        (same,) = shapes.glob(f"*2014/COCO_*_{int(sample.sample_id):012d}.jpg")
        assert sample.image.read_bytes() == same.read_bytes()


def test_a_model_is_trained_on_regions(fit: Callable[..., Any], shapes: Path) -> None:
    done = fit(
        "--trainer.enable_checkpointing=false", "--data.caption_words=colors", data="VisualGenomeDataModule",
        root=shapes / "visual_genome",
    )  # fmt: skip
    assert done.status == 0, done.err
    error = fit("--data.caption_words=[zebra]", data="VisualGenomeDataModule", root=shapes / "visual_genome").error
    assert "split 'train' has no samples for `fit` with words of caption_words; choose others" in error
