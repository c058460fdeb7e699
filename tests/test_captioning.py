"""Captions in Karpathy's format, and what all picture data modules share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conceptshift.datamodules import BadImageError, CaptionDataModule, SkippedSample, word_class
from conceptshift.datamodules.base import _Collate, _Pictures
from conceptshift.datamodules.sample import Sample
from conceptshift.datamodules.word_classes import has_word
from conceptshift.lightning_modules.backbone import Selector
from PIL import Image


def entry(number: int, split: str, *captions: str, **changes: Any) -> dict[str, Any]:
    row = {
        "filepath": "pictures",
        "filename": f"{number}.png",
        "cocoid": 100 + number,
        "imgid": number,
        "split": split,
        "sentences": [{"raw": caption} for caption in captions],
    }
    return {**row, **changes}


ENTRIES = [
    entry(0, "train", "A red dog runs.", "Two dogs\n play ", "A Dog in the park"),
    entry(1, "restval", "A blue-green bird", "birds on a hill"),
    entry(2, "train", "nothing to see"),
    entry(3, "val", "A hound", "The dog is brown", "dogged pursuit"),
    entry(4, "val", "a cat"),
    entry(5, "test", "a hotdog stand"),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number in range(6):
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
    return write(tmp_path, {"images": ENTRIES})


def write(root: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "dataset_coco.json").write_text(text, encoding="utf-8")
    return root


def samples(root: Path, stage: str, **options: Any) -> list[Sample]:
    data = CaptionDataModule(str(root), **options)
    data.setup(stage)
    return data.samples(stage)


def test_every_caption_is_learned(root: Path) -> None:
    found = samples(root, "fit", prompt="Say.")
    assert [(sample.sample_id, sample.target) for sample in found] == [
        ("100#0", "A red dog runs."),
        ("100#1", "Two dogs play"),
        ("100#2", "A Dog in the park"),
        ("102#0", "nothing to see"),
    ]
    assert found[0].image == root / "pictures" / "0.png"
    assert found[0].prompt == "Say."
    assert found[0].references == ("A red dog runs.", "Two dogs play", "A Dog in the park")


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_every_picture_is_described_once(root: Path, stage: str) -> None:
    found = samples(root, stage)
    assert [(sample.sample_id, sample.target) for sample in found] == [("103", "A hound"), ("104", "a cat")]
    assert found[0].references == ("A hound", "The dog is brown", "dogged pursuit")


def test_splits_are_joined_and_limited(root: Path) -> None:
    ids = [sample.sample_id for sample in samples(root, "fit", train_split="train+restval")]
    assert ids == ["100#0", "100#1", "100#2", "102#0", "101#0", "101#1"]
    ids = [sample.sample_id for sample in samples(root, "fit", train_split="train+restval", limit=5)]
    assert ids == ["100#0", "100#1", "100#2", "102#0", "101#0"]
    assert [sample.sample_id for sample in samples(root, "test", test_split="restval+test")] == ["101", "105"]


def test_caption_words_filter_what_is_learned_by_whole_words(root: Path) -> None:
    learned = samples(root, "fit", train_split="train+restval", caption_words="colors")
    assert [sample.sample_id for sample in learned] == ["100#0", "101#0"]
    learned = samples(root, "fit", train_split="train+val", caption_words=["DOG"])
    assert [sample.sample_id for sample in learned] == ["100#0", "100#2", "103#1"]
    # Validation keeps all pictures and references; what it would learn is the target.
    shown = samples(root, "validate", caption_words=["dog"])
    assert [(sample.sample_id, sample.target) for sample in shown] == [("103", "The dog is brown"), ("104", "a cat")]
    assert len(shown[0].references) == 3


def test_reference_words_filter_pictures_by_whole_words(root: Path) -> None:
    found = samples(root, "predict", predict_split="train+restval+val+test", reference_words=["dog"])
    assert [sample.sample_id for sample in found] == ["100", "103"]


def test_the_target_is_a_caption_with_the_word_in_question(root: Path) -> None:
    """States of a given answer are read at this word."""
    for stage in ("validate", "predict"):
        found = samples(root, stage, reference_words=["brown", "pursuit"])
        assert [(sample.sample_id, sample.target) for sample in found] == [("103", "The dog is brown")]
        found = samples(root, stage, reference_words=["pursuit"], caption_words="colors")
        assert [sample.target for sample in found] == ["dogged pursuit"]
    # Learned are all captions of such a picture.
    learned = samples(root, "fit", train_split="val", reference_words=["pursuit"])
    assert [sample.sample_id for sample in learned] == ["103#0", "103#1", "103#2"]


def test_words_may_come_from_a_file(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "animals.txt"
    path.write_text("Dog\n\n  bird  \n", encoding="utf-8")
    assert word_class(str(path)) == {"dog", "bird"}
    learned = samples(root, "fit", train_split="train+restval", caption_words=str(path))
    assert [sample.sample_id for sample in learned] == ["100#0", "100#2", "101#0"]
    assert Selector.parse(f"token_class:{path}").words == {"dog", "bird"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"red\nlight blue\n", r"words\.txt, line 2: 'light blue' would never be found; give single words of letters"),
        (b"red\n\nlight-blue\n", r"words\.txt, line 3: 'light-blue' would never be found"),
        (b"\n \n", r"words\.txt: has no word; give a \.txt file with one word a line"),
        (b"\xff\xfe", r"words\.txt: cannot be read \(it is no UTF-8 text\)"),
        (None, r"words\.txt: cannot be read \(No such file or directory\); give a \.txt file"),
    ],
)
def test_unusable_word_lists(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        word_class(str(tmp_path / "words.txt"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("word", ["hot dog", "light-blue", "Dog's", "3d", "a_b", " dog", "", "cafe\u0301"])
def test_a_word_that_no_text_has_is_refused(word: str) -> None:
    assert not has_word(f"the {word} is here", frozenset([word.lower()]))
    with pytest.raises(ValueError, match=re.escape(f"word list: {word.lower()!r} would never be found; give single")):
        word_class(["red", word])


@pytest.mark.parametrize("word", ["Dog", "caf\u00e9", "\u732b", "Stra\u00dfe"])
def test_a_word_that_a_text_has_is_taken(word: str) -> None:
    assert has_word(f"the {word}, is here", word_class([word]))


def test_pictures_without_coco_id_go_by_their_own(root: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "cocoid"} for row in ENTRIES]
    assert [sample.sample_id for sample in samples(write(root, {"images": rows}), "predict")] == ["3", "4"]


def test_the_description_tells_any_two_runs_with_other_samples_apart(root: Path) -> None:
    """A resumed extraction relies on it."""
    options: list[dict[str, Any]] = [
        {},
        {"prompt": "Say."},
        {"predict_split": "test"},
        {"limit": 1},
        {"reference_words": ["dog"]},
        {"caption_words": ["dog"]},  # changes targets
        {"annotations": "other.json"},
    ]
    described = [json.dumps(CaptionDataModule(str(root), **some).describe("predict")) for some in options]
    assert len(set(described)) == len(options)
    same = CaptionDataModule(str(root), batch_size=3, num_workers=2, seed=4, val_split="test", skip_bad_images=True)
    assert json.dumps(same.describe("predict")) == described[0]


def test_the_home_folder_may_be_written_as_a_tilde(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    found = samples(Path("~") / root.name, "predict")
    assert [sample.sample_id for sample in found] == ["103", "104"]
    assert found[0].image.is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "malformed JSON"),
        ("", "malformed JSON"),
        ("[]", "expected the key 'images'"),
        ('{"annotations": []}', "expected the key 'images'"),
        ({"images": []}, "no split 'val'"),
        ({"images": [entry(0, "train", "x")]}, "no split 'val'; it has train"),
        ({"images": None}, "dataset_coco.json"),
        ({"images": [1, 2]}, "dataset_coco.json"),
        ({"images": {"a": 1}}, "dataset_coco.json"),
        ({"images": [{"split": "val"}]}, "lacks 'imgid'"),
        ({"images": [entry(0, "val", "x", sentences=None)]}, "Karpathy"),
        ({"images": [entry(0, "val", "x", sentences=[{"tokens": []}])]}, "lacks 'raw'"),
        ({"images": [entry(0, "val", "x", filename=7)]}, "Karpathy"),
        ({"images": [entry(0, "val")]}, "dataset_coco.json"),
    ],
)
def test_unusable_annotations(root: Path, content: Any, message: str) -> None:
    write(root, content)
    with pytest.raises(ValueError, match=message) as caught:
        samples(root, "predict")
    assert "dataset_coco.json" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_annotations_that_are_no_text(root: Path) -> None:
    (root / "dataset_coco.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match=r"dataset_coco\.json: malformed JSON"):
        samples(root, "predict")


def test_missing_files(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such data folder; set --data\.init_args\.root"):
        samples(tmp_path / "nowhere", "predict")
    with pytest.raises(FileNotFoundError, match=r"other\.json: no such annotation file"):
        samples(root, "predict", annotations="other.json")


def test_a_name_that_leaves_the_folder(root: Path) -> None:
    write(root, {"images": [entry(0, "val", "x", filename="../../secret.jpg")]})
    with pytest.raises(BadImageError, match=r"secret\.jpg"):
        samples(root, "predict")


def test_filters_that_leave_nothing(root: Path) -> None:
    zebra = ["zebra"]
    with pytest.raises(ValueError, match="no samples for `predict` with words of reference_words; choose others"):
        samples(root, "predict", reference_words=zebra, caption_words=["dog"])
    with pytest.raises(ValueError, match="no samples for `fit` with words of caption_words; choose others"):
        samples(root, "fit", caption_words=zebra)
    with pytest.raises(ValueError, match="no samples for `fit` with words of caption_words and reference_words"):
        samples(root, "fit", caption_words=zebra, reference_words=["dog"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"--data\.init_args\.batch_size must be at least 1, got 0"),
        ({"limit": 0}, r"--data\.init_args\.limit must be at least 1, got 0"),
        (
            {"caption_words": "fruits"},
            r"no word class 'fruits'; there are colors, places, sentiments \(conceptshift\.data",
        ),
        ({"reference_words": []}, "at least one word"),
    ],
)
def test_bad_options(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CaptionDataModule(str(root), **options)


def test_bad_pictures_stop_or_are_listed(root: Path) -> None:
    (root / "pictures" / "3.png").write_bytes(b"no picture")
    found = samples(root, "predict")
    with pytest.raises(BadImageError, match=r"3\.png"):
        _Pictures(found, skip_bad_images=False)[0]
    items = [_Pictures(found, skip_bad_images=True)[index] for index in range(2)]
    assert isinstance(items[0], SkippedSample)
    encoded: list[Any] = []
    batch = _Collate(lambda *arguments: encoded.append(arguments) or {})(items)  # type: ignore[func-returns-value]
    assert (batch.sample_ids, [item.sample_id for item in batch.skipped]) == (["104"], ["103"])
    assert "3.png" in batch.skipped[0].reason
    ((images, prompts, targets),) = encoded
    assert (len(images), len(prompts), list(targets)) == (1, 1, ["a cat"])
    assert _Collate(lambda *arguments: pytest.fail("nothing to encode"))(items[:1]).samples == []
