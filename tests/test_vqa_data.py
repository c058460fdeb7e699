"""Questions in VQAv2's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conceptshift.datamodules import VQADataModule
from conceptshift.datamodules.sample import Sample

QUESTIONS = [
    {"question_id": 42, "image_id": 7, "question": "Is it red?"},
    {"question_id": 43, "image_id": 7, "question": "How many?"},
    {"question_id": 44, "image_id": 123456, "question": "What is it?"},
]
ANSWERS = [
    {
        "question_id": number,
        "image_id": 7,
        "question_type": kind,
        "answer_type": answer_type,
        "multiple_choice_answer": answer,
        "answers": [{"answer": answer, "answer_id": index} for index in range(9)] + [{"answer": "other"}],
    }
    # The two files need not have the same order.
    for number, kind, answer_type, answer in (
        (44, "what is", "other", "dog"),
        (42, "is it", "yes/no", "yes"),
        (43, "how many", "number", "2"),
    )
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "questions", {"questions": QUESTIONS})
    return write(tmp_path, "annotations", {"annotations": ANSWERS})


def write(root: Path, kind: str, content: Any) -> Path:
    name = {"questions": "v2_OpenEnded_mscoco_val2014_questions", "annotations": "v2_mscoco_val2014_annotations"}[kind]
    (root / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def samples(root: Path, **options: Any) -> list[Sample]:
    data = VQADataModule(str(root), **options)
    data.setup("predict")
    return data.samples("predict")


def test_questions_are_joined_with_their_answers(root: Path) -> None:
    first, second, third = samples(root, prompt=" Be brief.")
    assert (first.sample_id, first.prompt, first.target) == ("42", "Is it red? Be brief.", "yes")
    assert (first.answer_type, first.question_type) == ("yes/no", "is it")
    assert first.answers == ("yes",) * 9 + ("other",)
    assert first.image == root / "val2014" / "COCO_val2014_000000000007.jpg"
    assert (second.sample_id, second.target) == ("43", "2")
    assert (third.sample_id, third.image.name) == ("44", "COCO_val2014_000000123456.jpg")


def test_shapes_is_read_whole(shapes: Path) -> None:
    found = samples(shapes)
    assert len(found) == 8 * 6
    assert all(sample.image.is_file() and len(sample.answers) == 10 for sample in found)


def test_answer_types_filter(root: Path) -> None:
    assert [sample.sample_id for sample in samples(root, answer_types=["other", "number"])] == ["43", "44"]
    assert [sample.sample_id for sample in samples(root, answer_types=["other", "number"], limit=1)] == ["43"]
    with pytest.raises(ValueError, match=r"answer_types: no 'yes'; .*annotations\.json has number, other, yes/no"):
        samples(root, answer_types=["yes"])


def test_the_description_tells_any_two_runs_with_other_samples_apart(root: Path) -> None:
    options: list[dict[str, Any]] = [
        {}, {"prompt": "x"}, {"predict_split": "train2014"}, {"limit": 1}, {"answer_types": ["other"]}
    ]  # fmt: skip
    described = {json.dumps(VQADataModule(str(root), **some).describe("predict")) for some in options}
    assert len(described) == len(options)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("questions", '{"questions": [', "malformed JSON"),
        ("annotations", "[]", "expected the key 'annotations'"),
        ("annotations", {"annotations": ANSWERS[:2]}, "no match or key 43"),
        ("annotations", {"annotations": None}, "VQAv2"),
        ("questions", {"questions": [1]}, "VQAv2"),
        ("questions", {"questions": [{**QUESTIONS[0], "image_id": "x"}]}, "v2_OpenEnded"),
        ("questions", {"questions": []}, "no samples"),
    ],
)
def test_unusable_files(root: Path, kind: str, content: Any, message: str) -> None:
    write(root, kind, content)
    with pytest.raises(ValueError, match=message) as caught:
        samples(root)
    assert str(root) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_files(root: Path) -> None:
    with pytest.raises(ValueError, match="no VQA split 'train2014'; it has val2014"):
        samples(root, predict_split="train2014")
    (root / "v2_OpenEnded_mscoco_val2014_questions.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"questions\.json: no such annotation file"):
        samples(root)
    (root / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"questions\.json: no such annotation file"):
        samples(root)
