"""Folders of pictures with JSON lines: what becomes of the keys, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conceptshift.datamodules import FolderDataModule, VQADataModule
from conceptshift.datamodules.sample import Sample
from PIL import Image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three pictures; of one of them two lines."""
    folder = tmp_path / "pictures"
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(path)
    lines: list[dict[str, Any]] = [
        {"file_name": "a/1.png", "q": "What?", "a": "dog", "kind": "safe", "id": 7},
        {"file_name": "b/1.png", "q": "Who?", "a": ["cat", "cow", "cow"], "kind": "unsafe", "id": "x"},
        {"file_name": "a/1.png", "q": "Why?", "a": None, "kind": 3, "id": 9},
    ]
    # An empty line is none, but has a number; a byte order mark and Windows' line ends are others' ways of writing.
    text = "\r\n".join([json.dumps(lines[0]), "", *map(json.dumps, lines[1:])])
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return folder


@pytest.fixture
def samples(root: Path) -> Callable[..., list[Sample]]:
    def read(**options: Any) -> list[Sample]:
        data = FolderDataModule(str(root), **{"prompt": " Be brief.", **options})
        data.setup("predict")
        return data.samples("predict")

    return read


def test_lines_are_samples(root: Path, samples: Callable[..., list[Sample]]) -> None:
    assert samples(question="q", answers="a", label="kind") == [
        Sample("metadata/1", root / "a/1.png", "What? Be brief.", "dog", answers=("dog",) * 10, label="safe"),
        Sample("metadata/3", root / "b/1.png", "Who? Be brief.", "cow", answers=("cat", "cow", "cow"), label="unsafe"),
        Sample("metadata/4", root / "a/1.png", "Why? Be brief.", "", label="3"),
    ]
    assert [sample.references for sample in samples(references="a")] == [("dog",), ("cat", "cow", "cow"), ()]


def test_samples_are_chosen(samples: Callable[..., list[Sample]]) -> None:
    assert [sample.sample_id for sample in samples(limit=2)] == ["metadata/1", "metadata/3"]
    assert [sample.sample_id for sample in samples(sample_id="id")] == ["7", "x", "9"]
    chosen = samples(label="kind", labels=["unsafe", "3"], limit=1)
    assert [sample.sample_id for sample in chosen] == ["metadata/3"]


def test_shapes_by_way_of_a_folder(tmp_path: Path, shapes: Path) -> None:
    """The same questions as from VQAv2's own files, of two splits as well."""
    shapes = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    expected = VQADataModule(str(shapes), predict_split="val2014+train2014")
    expected.setup("predict")
    for split in ("val2014", "train2014"):
        single = VQADataModule(str(shapes), predict_split=split)
        single.setup("predict")
        with (shapes / f"lines-{split}.jsonl").open("w") as file:
            for sample in single.samples("predict"):
                row = {
                    "file": sample.image.relative_to(shapes).as_posix(),
                    "text": sample.prompt.removesuffix(single.prompt),
                    "target": sample.target,
                    "answers": [{"answer": answer} for answer in sample.answers],
                    "answer_type": sample.answer_type,
                    "question_type": sample.question_type,
                    "id": int(sample.sample_id),
                }
                file.write(json.dumps(row) + "\n")
    found = FolderDataModule(
        str(shapes), image="file", prompt=expected.prompt, question="text", target="target", answers="answers",
        answer_type="answer_type", question_type="question_type", sample_id="id",
        predict_split="lines-val2014+lines-train2014",
    )  # fmt: skip
    found.setup("predict")
    assert found.samples("predict") == expected.samples("predict")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"file_name": "a/1.png"',
            r"metadata.jsonl: line 5: malformed JSON \(Expecting ',' delimiter\); mend the line$",
        ),
        ('{"file_name": "a/\\1.png"}', r"line 5: malformed JSON \(Invalid \\escape\); mend the line"),
        ("[" * 100_000, r"line 5: malformed JSON"),
        ('["a/1.png"]', r"line 5: expected an object, got list"),
        ('{"name": "a/1.png", "q": ""}', r"line 5: no key 'file_name' for --data.init_args.image; it has name, q$"),
        ('{"file_name": "a/1.png"}', r"line 5: no key 'q' for --data.init_args.question; it has file_name$"),
        ('{"file_name": null, "q": ""}', r"line 5: expected a file name in 'file_name' for .*image, got NoneType"),
        ('{"file_name": "a/1.png", "q": 5}', r"line 5: expected a text in 'q' for --data.init_args.question, got int"),
        (
            '{"file_name": "../secret.png", "q": ""}',
            r"line 5: ../secret.png: an annotation names a file outside .*pictures;",
        ),
        ('{"file_name": "/etc/passwd", "q": ""}', r"line 5: /etc/passwd: an annotation names a file outside"),
    ],
)
def test_a_line_that_cannot_be_used(root: Path, samples: Callable[..., list[Sample]], line: str, message: str) -> None:
    with (root / "metadata.jsonl").open("a") as file:
        file.write("\r\n" + line)
    with pytest.raises(ValueError, match=message) as caught:
        samples(question="q")
    assert "\n" not in str(caught.value)
    assert len(samples(question="q", limit=3)) == 3, "lines behind the limit are not read"


def test_text_that_is_none(root: Path, samples: Callable[..., list[Sample]]) -> None:
    (root / "metadata.jsonl").write_bytes(b'{"file_name": "a/1.png"}\n\xff\xff\xff\n')
    with pytest.raises(ValueError, match=r"line 2: malformed JSON"):
        samples()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predict_split": "val"}, r"val.jsonl: no such file; the splits of --data.init_args.root are: metadata$"),
        ({"predict_split": "../metadata"}, r"no such file"),
        ({"sample_id": "file_name"}, r"two samples have the id 'a/1.png'; leave out --data.init_args.sample_id"),
        (
            {"label": "kind", "labels": ["odd"]},
            r"no row with one of --data.init_args.labels, only with safe, unsafe, 3",
        ),
        ({"labels": ["safe"]}, r"--data.init_args.labels needs .label"),
        ({"prompt": ""}, r"--data.init_args.prompt or .question must say"),
    ],
)
def test_an_option_that_cannot_be_used(
    samples: Callable[..., list[Sample]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        samples(**options)


def test_validation_from_the_command_line(validate: Callable[..., Any], root: Path, tmp_path: Path) -> None:
    """A missing picture stops the run, or is left out and listed."""
    (root / "b/1.png").unlink()
    arguments = (
        "--data.val_split=metadata", "--data.question=q", "--data.references=a", "--data.limit=2",
        "--trainer.callbacks+=CaptionScorer", f"--trainer.callbacks.out={tmp_path / 'scores.json'}",
    )  # fmt: skip
    run = validate(*arguments, data="FolderDataModule", root=root)
    assert "b/1.png: no such picture" in run.error
    assert "skip_bad_images=true" in run.error
    done = validate(*arguments, "--data.skip_bad_images=true", data="FolderDataModule", root=root)
    assert done.status == 0, done.err
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["samples"] == 1
    assert list(scores["skipped"]) == ["metadata/3"]


def test_the_options_that_all_share_are_explained(cli: Callable[..., Any]) -> None:
    """Names and explanations reach the help from the classes that have them."""
    for name in ("FolderDataModule", "HubDataModule", "CaptionDataModule", "VQADataModule", "VisualGenomeDataModule"):
        text = " ".join(cli("validate", f"--data.help={name}").out.split())
        for option, explained in {
            "limit": "At most this many samples", "batch_size": "Samples per batch", "num_workers": "Loader processes",
            "seed": "Seed of the shuffling", "skip_bad_images": "Leave out unreadable pictures",
        }.items():  # fmt: skip
            assert f"--data.{option}" in text, (name, option)
            assert explained in text, (name, option)
