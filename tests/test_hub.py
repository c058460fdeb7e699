"""Data sets in the formats of the hub: what becomes of their columns, where their pictures go, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import datasets
import pytest
from conceptshift.datamodules import HubDataModule, MixtureDataModule, VQADataModule, read_image
from conceptshift.datamodules.sample import Sample
from conceptshift.datamodules.stored_features import FeatureStore
from datasets import ClassLabel, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

COLORS = ["red", "green", "blue", "white"]


def encoded(color: str, mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).convert(mode).save(file, kind)
    return file.getvalue()


def write_parquet(folder: Path, columns: dict[str, Any], split: str = "validation", **types: Any) -> Path:
    """Write a data set as the hub has them: pictures embedded, types in the file."""
    folder.mkdir(exist_ok=True)
    features = Features({**dict.fromkeys(columns, Value("string")), "image": ImageFeature(), **types})
    data = datasets.Dataset.from_dict(columns, features=features)
    data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(autouse=True)
def no_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.parent / f"{tmp_path.name}-cache")


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    pictures = [{"bytes": encoded(color), "path": "../../../escaped.png"} for color in COLORS]
    questions = [f"Is it {color}?" for color in COLORS]
    labels = [0, 1, 0, -1]
    columns = {"image": pictures, "question": questions, "label": labels, "id": ["a", "b", "c", "d"]}
    return write_parquet(tmp_path / "colors", columns, label=ClassLabel(names=["safe", "unsafe"]))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., HubDataModule]:
    """A data module after `setup("predict")`; pictures are written to `pictures`."""

    def read(path: Path | str, **options: Any) -> HubDataModule:
        given = {"prompt": "What is it?", "pictures": str(tmp_path / "pictures"), **options}
        data = HubDataModule(str(path), **given)
        data.setup("predict")
        return data

    return read


@pytest.fixture
def samples(make: Callable[..., HubDataModule]) -> Callable[..., list[Sample]]:
    return lambda path, **options: make(path, **options).samples("predict")


def test_rows_are_samples(colors: Path, samples: Callable[..., list[Sample]]) -> None:
    found = samples(colors, question="question", prompt=" Be brief.", label="label", sample_id="id", target="question")
    assert [sample.sample_id for sample in found] == ["a", "b", "c", "d"]
    assert [sample.prompt for sample in found] == [f"Is it {color}? Be brief." for color in COLORS]
    assert [sample.target for sample in found] == [f"Is it {color}?" for color in COLORS]
    assert [sample.label for sample in found] == ["safe", "unsafe", "safe", ""]
    for sample, color in zip(found, COLORS, strict=True):
        assert read_image(sample.image).tobytes() == Image.new("RGB", (8, 8), color).tobytes()


def test_pictures_are_written_as_they_are_and_by_no_name_of_the_data(
    tmp_path: Path, samples: Callable[..., list[Sample]]
) -> None:
    contents = [encoded("red", "L"), encoded("red", "RGBA"), encoded("red", kind="JPEG"), encoded("red", kind="WEBP")]
    pictures = [{"bytes": content, "path": f"{tmp_path}/outside.png"} for content in contents]
    write_parquet(tmp_path / "data", {"image": pictures})
    before = set(tmp_path.iterdir())
    found = samples(tmp_path / "data")
    assert [sample.image.read_bytes() for sample in found] == contents
    assert [sample.image.suffix for sample in found] == [".png", ".png", ".jpg", ".webp"]
    assert {sample.image.parent for sample in found} == {tmp_path / "pictures"}
    assert set(tmp_path.iterdir()) - before == {tmp_path / "pictures"}
    assert all(read_image(sample.image).mode == "RGB" for sample in found)


def test_pictures_are_written_once(colors: Path, make: Callable[..., HubDataModule]) -> None:
    first = make(colors)
    written = {sample.image: sample.image.stat().st_mtime_ns for sample in first.samples("predict")}
    lost = first.samples("predict")[2].image
    lost.unlink()
    again = make(colors)
    assert [sample.image for sample in again.samples("predict")] == list(written)
    assert {path: path.stat().st_mtime_ns for path in written if path != lost} == {
        path: when for path, when in written.items() if path != lost
    }
    assert lost.is_file()
    assert sorted(os.listdir(first.root)) == sorted(path.name for path in written)


def test_the_limit_is_all_that_is_read(tmp_path: Path, colors: Path, samples: Callable[..., list[Sample]]) -> None:
    full = samples(colors)
    shutil.rmtree(tmp_path / "pictures")
    found = samples(colors, limit=2)
    assert found == full[:2]
    assert len(os.listdir(tmp_path / "pictures")) == 2


def test_labels_are_kept_and_rows_keep_their_numbers(colors: Path, samples: Callable[..., list[Sample]]) -> None:
    found = samples(colors, label="label", labels=["safe"])
    assert [sample.sample_id for sample in found] == ["validation/0", "validation/2"]
    assert [s.sample_id for s in samples(colors, label="label", labels=["safe", "unsafe"], limit=2)] == [
        "validation/0",
        "validation/1",
    ]


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (List(Value("string")), [["a", "b", "b"], ["c"], []], [("a", "b", "b"), ("c",) * 10, ()]),
        (Value("string"), ["a", None, "b"], [("a",) * 10, (), ("b",) * 10]),
        (
            List({"answer": Value("string"), "answer_id": Value("int32")}),
            [
                [{"answer": "a", "answer_id": 1}],
                [{"answer": "b", "answer_id": 1}, {"answer": "c", "answer_id": 2}],
                None,
            ],
            [("a",) * 10, ("b", "c"), ()],
        ),
    ],
)
def test_ragged_answers(
    tmp_path: Path, samples: Callable[..., list[Sample]], kind: Any, given: Any, expected: Any
) -> None:
    pictures = [{"bytes": encoded("red"), "path": None}] * 3
    data = write_parquet(tmp_path / "data", {"image": pictures, "given": given}, given=kind)
    found = samples(data, answers="given")
    assert [sample.answers for sample in found] == expected
    # The most frequent answer, where no column of targets is named.
    assert found[0].target == max(expected[0], key=expected[0].count)


def test_references(tmp_path: Path, samples: Callable[..., list[Sample]]) -> None:
    pictures = [{"bytes": encoded("red"), "path": None}] * 2
    given = [["A  dog.\n", "A cat."], ["A cow."]]
    data = write_parquet(tmp_path / "data", {"image": pictures, "captions": given}, captions=List(Value("string")))
    found = samples(data, references="captions")
    assert [sample.references for sample in found] == [("A dog.", "A cat."), ("A cow.",)]
    assert [sample.target for sample in found] == ["A dog.", "A cow."]


def test_shapes_by_way_of_parquet(tmp_path: Path, shapes: Path, samples: Callable[..., list[Sample]]) -> None:
    """The same questions as from VQAv2's own files."""
    data = VQADataModule(str(shapes))
    data.setup("predict")
    expected = data.samples("predict")
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": sample.image.read_bytes(), "path": sample.image.name} for sample in expected],
        "q": [sample.prompt.removesuffix(data.prompt) for sample in expected],
        "multiple_choice_answer": [sample.target for sample in expected],
        "answers": [[{"answer": text} for text in sample.answers] for sample in expected],
        "answer_type": [sample.answer_type for sample in expected],
        "question_type": [sample.question_type for sample in expected],
        "question_id": [int(sample.sample_id) for sample in expected],
    }
    types = {"answers": List({"answer": Value("string")}), "question_id": Value("int64")}
    found = samples(
        write_parquet(tmp_path / "vqa", columns, **types), question="q", prompt=data.prompt,
        target="multiple_choice_answer", answers="answers", answer_type="answer_type", question_type="question_type",
        sample_id="question_id",
    )  # fmt: skip
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert one.image.read_bytes() == other.image.read_bytes()
        assert Sample(**{**vars(one), "image": other.image}) == other


def folder_of_pictures(root: Path, names: list[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), path.parent.name).save(path)
    return root


def test_pictures_in_folders_stay_where_they_are(tmp_path: Path, make: Callable[..., HubDataModule]) -> None:
    root = folder_of_pictures(
        tmp_path / "data", [f"validation/{name}" for name in ("red/1.png", "blue/1.png", "blue/2.jpg")]
    )
    data = make(root, label="label")
    found = {sample.image.relative_to(root).as_posix(): sample.label for sample in data.samples("predict")}
    assert found == {
        "validation/red/1.png": "red",
        "validation/blue/1.png": "blue",
        "validation/blue/2.jpg": "blue",
    }
    assert not os.listdir(data.root)


def test_pictures_in_an_archive_are_written(tmp_path: Path, samples: Callable[..., list[Sample]]) -> None:
    root = folder_of_pictures(tmp_path / "loose", ["validation/red/1.png", "validation/blue/1.png"])
    (tmp_path / "data").mkdir()
    shutil.make_archive(str(tmp_path / "data" / "validation"), "zip", root / "validation")
    found = samples(tmp_path / "data")
    contents = {(root / "validation" / color / "1.png").read_bytes() for color in ("red", "blue")}
    assert {sample.image.read_bytes() for sample in found} == contents
    assert {sample.image.parent for sample in found} == {tmp_path / "pictures"}


def test_names_of_files_in_json(tmp_path: Path, samples: Callable[..., list[Sample]]) -> None:
    root = folder_of_pictures(tmp_path / "data", ["files/red/1.png"])
    write = (root / "validation.jsonl").write_text
    write(json.dumps({"file": "files/red/1.png", "n": 1}) + "\n")
    (found,) = samples(root, image="file", label="n")
    assert (found.image, found.label) == (root / "files/red/1.png", "1")
    write(json.dumps({"file": "../pictures/secret.png"}) + "\n")
    with pytest.raises(ValueError, match=r"names a file outside"):
        samples(root, image="file")
    write(json.dumps({"file": "https://example.com/1.png"}) + "\n")
    with pytest.raises(ValueError, match=r"https://example.com/1.png is no picture of this data set"):
        samples(root, image="file")


def test_splits_are_joined(colors: Path, tmp_path: Path, samples: Callable[..., list[Sample]]) -> None:
    shutil.copy(colors / "validation-00000-of-00001.parquet", colors / "test-00000-of-00001.parquet")
    found = samples(colors, predict_split="test+validation")
    assert [sample.sample_id for sample in found] == [
        f"{split}/{n}" for split in ("test", "validation") for n in range(4)
    ]
    with pytest.raises(ValueError, match=r"two samples have the id 'a'.*sample_id"):
        samples(colors, predict_split="test+validation", sample_id="id")


def test_the_description_changes_with_what_samples_depend_on(colors: Path, make: Callable[..., HubDataModule]) -> None:
    described = [
        json.dumps(make(colors, **options).describe("predict"))
        for options in ({}, {"num_workers": 1}, {"prompt": "Say."}, {"label": "label"}, {"limit": 2})
    ]
    assert described[0] == described[1]
    assert len(set(described)) == 4
    file = colors / "validation-00000-of-00001.parquet"
    os.utime(file, (1, 1))
    assert json.dumps(make(colors).describe("predict")) != described[0]


def test_a_part_of_a_mixture(colors: Path, shapes: Path, tmp_path: Path) -> None:
    part = HubDataModule(str(colors), prompt="Say.", pictures=str(tmp_path / "pictures"))
    mixture = MixtureDataModule([part, VQADataModule(str(shapes), limit=2)])
    mixture.setup("predict")
    assert len(mixture.samples("predict")) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predict_split": "nowhere"}, r"colors: no split 'nowhere'; it has validation$"),
        ({"image": "img"}, r"no column 'img' for --data.init_args.image; it has image, question, label, id$"),
        ({"references": "captions"}, r"no column 'captions' for --data.init_args.references; it has image"),
        ({"image": "label"}, r"row 0: expected pictures in 'label' for --data.init_args.image, got int"),
        ({"target": "label"}, r"row 0: expected a text in 'label' for --data.init_args.target, got int"),
        ({"answers": "label"}, r"row 0: expected a text or a list of texts .*answers, got int"),
        ({"label": "image"}, r"row 0: expected texts or numbers in 'image' for --data.init_args.label, got dict"),
        (
            {"name": "nothing"},
            r"colors: cannot be read .*'nothing' not found. Available: \['default'\]\); see --data.init_",
        ),
        (
            {"label": "label", "labels": ["odd"]},
            r"has no row with one of --data.init_args.labels, only with safe, unsafe",
        ),
        ({"labels": ["safe"]}, r"--data.init_args.labels needs .label"),
        ({"prompt": ""}, r"--data.init_args.prompt or .question must say"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    colors: Path, samples: Callable[..., list[Sample]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        samples(colors, **options)
    assert "\n" not in str(caught.value)


def test_no_such_data_set(tmp_path: Path, samples: Callable[..., list[Sample]]) -> None:
    # Tests run offline.
    with pytest.raises(ValueError, match=r"^nobody/nothing: cannot be read as a data set \(Couldn't reach"):
        samples("nobody/nothing")
    with pytest.raises(ValueError, match=r"nowhere: cannot be read as a data set \(folder .*: no such folder"):
        samples(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: cannot be read as a data set"):
        samples(tmp_path / "empty")


def test_a_damaged_file(colors: Path, samples: Callable[..., list[Sample]]) -> None:
    file = colors / "validation-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"colors: cannot be read as a data set") as caught:
        samples(colors)
    assert "\n" not in str(caught.value)


def test_code_in_a_folder_is_not_run(tmp_path: Path, samples: Callable[..., list[Sample]]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"scripts are no longer supported"):
        samples(tmp_path / "data")
    assert not (tmp_path / "ran").exists()


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_is_unpickled(tmp_path: Path, samples: Callable[..., list[Sample]], streaming: bool) -> None:
    """Neither a file of the data set nor a field in an archive."""
    pickled = pickle.dumps(Harmful(tmp_path / "ran"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "validation.pkl").write_bytes(pickled)
    with pytest.raises(ValueError, match=r"cannot be read as a data set"):
        samples(tmp_path / "data", streaming=streaming)
    (tmp_path / "web").mkdir()
    with tarfile.open(tmp_path / "web" / "validation.tar", "w") as archive:
        for ending, content in {"png": encoded("red"), "pkl": pickled, "pickle": pickled, "pyd": pickled}.items():
            info = tarfile.TarInfo(f"1.{ending}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert len(samples(tmp_path / "web", image="png", streaming=streaming)) == 1
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match=r"expected a text in 'pkl'"):
        samples(tmp_path / "web", image="png", target="pkl", streaming=streaming)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickled)
    assert (tmp_path / "ran").exists()


class Prepared:
    """Stands for a data set of the hub, of which one downloads all and another streams."""

    hash = "0123abc"
    config = None
    info = SimpleNamespace(splits=None)

    def __init__(self, data: Any) -> None:
        self.data = data
        self.prepared = False

    def download_and_prepare(self) -> None:
        self.prepared = True

    def as_dataset(self) -> Any:
        assert self.prepared
        return {"validation": self.data}

    def as_streaming_dataset(self) -> Any:
        return {"validation": self.data.to_iterable_dataset()}


@pytest.mark.parametrize("limit", [None, 2])
def test_a_data_set_of_the_hub(
    colors: Path, make: Callable[..., HubDataModule], monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """With a limit it is streamed; without, it is downloaded."""
    expected = make(colors, label="label", limit=limit).samples("predict")
    builder = Prepared(datasets.Dataset.from_parquet(str(next(colors.iterdir())), keep_in_memory=True))
    load = Mock(return_value=builder)
    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    data = make("somebody/colors", label="label", limit=limit, name="default", revision="v1")
    assert data.samples("predict") == expected
    load.assert_called_once_with("somebody/colors", "default", revision="v1")
    assert builder.prepared == (limit is None)
    assert data.describe("predict")["fingerprint"] == "0123abc"


def test_only_pictures_of_the_data_set_are_fetched(
    tmp_path: Path, samples: Callable[..., list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, message in (
        ("train2017/1.jpg", r"somebody/colors: has no picture 'train2017/1.jpg', only its name"),
        (
            "hf://datasets/other/secret@main/1.jpg",
            r"hf://datasets/other/secret@main/1.jpg is no picture of this data set",
        ),
        (f"zip://1.jpg::{tmp_path}/other.zip", r"other.zip is no picture of this data set"),
    ):
        builder = Prepared(datasets.Dataset.from_dict({"image": [name]}))
        monkeypatch.setattr(datasets, "load_dataset_builder", Mock(return_value=builder))
        with pytest.raises(ValueError, match=message):
            samples("somebody/colors")


def test_extraction_from_the_command_line(cli: Callable[..., Any], tiny: Path, tmp_path: Path, colors: Path) -> None:
    """With a broken picture and a row without one, which are left out; twice, from the same written pictures."""
    pictures = [
        {"bytes": encoded("red", "L"), "path": None},
        {"bytes": b"no picture", "path": "a.png"},
        None,
        {"bytes": encoded("blue", "RGBA"), "path": None},
    ]
    data = write_parquet(tmp_path / "data", {"image": pictures, "kind": ["safe", "unsafe", "safe", "unsafe"]})
    arguments = [
        "predict", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model=FeatureExtraction",
        f"--model.model_id={tiny}", "--model.sites=[lm.block.1]", "--model.selectors=[last_prompt]",
        "--model.max_new_tokens=3", "--data=HubDataModule", f"--data.path={data}", "--data.prompt=What is it?",
        "--data.label=kind", f"--data.pictures={tmp_path / 'pictures'}", "--trainer.callbacks+=FeatureWriter",
        f"--trainer.callbacks.folder={tmp_path / 'features'}",
    ]  # fmt: skip
    assert "skip_bad_images=true" in cli(*arguments).error
    for _ in range(2):
        done = cli(*arguments, "--data.skip_bad_images=true", "--trainer.callbacks.overwrite=true")
        assert done.status == 0, done.err
        store = FeatureStore(tmp_path / "features")
        rows = store.samples("original")
        assert {sample_id: row["label"] for sample_id, row in rows.items()} == {
            "validation/0": "safe",
            "validation/3": "unsafe",
        }
        assert len(os.listdir(tmp_path / "pictures")) == 3
