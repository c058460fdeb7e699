"""Writes Shapes in the formats that real data sets come in, so that the same readers serve both."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from .draw import draw_scene
from .language import captions, questions, region_phrases, ten_answers
from .scene import KINDS, SIZE, Scene, random_scene

Json = dict[str, Any]

_VERSION = 2  # counts changes of what is written: equal version and seed mean equal bytes
_RECEIPT = "shapes.json"

# Of every 40 pictures: 32 train, 2 restval, 3 val, 3 test. As with COCO, restval, val and test lie in val2014.
_SPLITS = ("train",) * 32 + ("restval",) * 2 + ("val",) * 3 + ("test",) * 3


def write_shapes(out: Path, images: int, seed: int = 0, max_things: int = 3) -> Path:
    """Generate the data set below `out`.

    Writes `train2014/` and `val2014/` (JPEG), `dataset_coco.json` (Karpathy captions and splits),
    `v2_OpenEnded_mscoco_{train,val}2014_questions.json`, `v2_mscoco_{train,val}2014_annotations.json`,
    `annotations/instances_{train,val}2014.json` (masks as RLE), and `visual_genome/` with
    `region_descriptions.json` and the pictures once more, under the names that they have there (`VG_100K/1.jpg`).
    The same `images` and `seed` give the same bytes. A folder that already holds exactly this is left alone.

    Args:
        out: Folder to make; it appears only when it is complete.
        images: Number of pictures, at least 40, so that no split is empty.
        seed: Seed of scenes, drawing, wording and answers.
        max_things: Things in a picture at most, 1 to 3.

    Returns:
        `out`.

    Raises:
        ValueError: `images` is below 40, `max_things` is not 1 to 3, or `out` holds something else.
    """
    if images < len(_SPLITS):
        raise ValueError(f"--images must be at least {len(_SPLITS)}, so that every split has some; got {images}")
    if not 1 <= max_things <= 3:
        raise ValueError(f"--max_things must be 1, 2 or 3, got {max_things}")
    receipt: Json = {"images": images, "seed": seed, "max_things": max_things, "version": _VERSION}
    if out.exists() and any(out.iterdir()):
        found = _read_receipt(out)
        if found == receipt:
            return out
        raise ValueError(f"{out} already holds {found or 'other files'}; choose another --out or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_all(working, images, seed, max_things)
        _dump(working / _RECEIPT, receipt)
        working.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(working, out)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    return out


def _read_receipt(out: Path) -> Json | None:
    path = out / _RECEIPT
    if not path.is_file():
        return None
    receipt: Json = json.loads(path.read_text())
    return receipt


def _dump(path: Path, value: Json | list[Json]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, separators=(",", ":")))


class _Tables:
    """The annotation files of one image folder (train2014 or val2014), filled picture by picture."""

    def __init__(self) -> None:
        self.images: list[Json] = []
        self.instances: list[Json] = []
        self.questions: list[Json] = []
        self.annotations: list[Json] = []

    def add_instances(self, image_id: int, filename: str, scene: Scene, masks: list[Image.Image]) -> None:
        self.images.append({"id": image_id, "file_name": filename, "width": SIZE, "height": SIZE})
        for number, (thing, mask) in enumerate(zip(scene.things, masks, strict=True)):
            rle = coco_mask.encode(np.asfortranarray(np.asarray(mask, dtype=np.uint8)))
            self.instances.append(
                {
                    "id": image_id * 10 + number,
                    "image_id": image_id,
                    "category_id": KINDS.index(thing.kind) + 1,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                    "area": float(coco_mask.area(rle)),
                    "bbox": [float(side) for side in coco_mask.toBbox(rle)],
                    "iscrowd": 0,
                }
            )

    def add_questions(self, image_id: int, scene: Scene, rng: random.Random) -> None:
        for number, question in enumerate(questions(scene, rng)):
            question_id = image_id * 10 + number
            self.questions.append({"image_id": image_id, "question": question.text, "question_id": question_id})
            self.annotations.append(
                {
                    "image_id": image_id,
                    "question_id": question_id,
                    "question_type": question.question_type,
                    "answer_type": question.answer_type,
                    "multiple_choice_answer": question.answer,
                    "answers": [
                        {"answer": answer, "answer_confidence": "yes", "answer_id": index + 1}
                        for index, answer in enumerate(ten_answers(question, rng))
                    ],
                }
            )

    def write(self, root: Path, folder: str) -> None:
        vqa = {"info": {"description": "Shapes"}, "data_type": "mscoco", "data_subtype": folder}
        categories = [{"id": i + 1, "name": kind, "supercategory": "shape"} for i, kind in enumerate(KINDS)]
        _dump(
            root / "annotations" / f"instances_{folder}.json",
            {"images": self.images, "annotations": self.instances, "categories": categories},
        )
        _dump(
            root / f"v2_OpenEnded_mscoco_{folder}_questions.json",
            {**vqa, "task_type": "Open-Ended", "questions": self.questions},
        )
        _dump(root / f"v2_mscoco_{folder}_annotations.json", {**vqa, "annotations": self.annotations})


def _scenes(images: int, seed: int, max_things: int) -> Iterator[tuple[int, Scene, random.Random]]:
    """Each picture has a random stream of its own, so that its look does not depend on how many there are."""
    for image_id in range(1, images + 1):
        rng = random.Random(f"{seed}-{image_id}")
        yield image_id, random_scene(rng, max_things), rng


def _write_all(root: Path, images: int, seed: int, max_things: int) -> None:
    tables = {"train2014": _Tables(), "val2014": _Tables()}
    karpathy: list[Json] = []
    regions: list[Json] = []
    for folder in (*tables, "visual_genome/VG_100K"):
        (root / folder).mkdir(parents=True)
    for image_id, scene, rng in tqdm(_scenes(images, seed, max_things), "drawing shapes", images, leave=False):
        split = _SPLITS[(image_id - 1) % len(_SPLITS)]
        folder = "train2014" if split == "train" else "val2014"
        filename = f"COCO_{folder}_{image_id:012d}.jpg"
        picture, masks = draw_scene(scene, rng)
        picture.save(root / folder / filename, quality=95, subsampling=0)
        shutil.copyfile(root / folder / filename, root / "visual_genome" / "VG_100K" / f"{image_id}.jpg")
        tables[folder].add_instances(image_id, filename, scene, masks)
        tables[folder].add_questions(image_id, scene, rng)
        karpathy.append(_karpathy_row(image_id, split, folder, filename, captions(scene)))
        regions.append(_region_row(image_id, scene, masks))
    for folder, table in tables.items():
        table.write(root, folder)
    _dump(root / "dataset_coco.json", {"dataset": "coco", "images": karpathy})
    _dump(root / "visual_genome" / "region_descriptions.json", regions)


def _karpathy_row(image_id: int, split: str, folder: str, filename: str, texts: list[str]) -> Json:
    sentence_ids = [image_id * 10 + number for number in range(len(texts))]
    return {
        "filepath": folder,
        "filename": filename,
        "cocoid": image_id,
        "imgid": image_id - 1,
        "split": split,
        "sentids": sentence_ids,
        "sentences": [
            {
                "raw": text,
                "tokens": text.replace(",", "").split(),
                "imgid": image_id - 1,
                "sentid": sentence_id,
            }
            for text, sentence_id in zip(texts, sentence_ids, strict=True)
        ],
    }


def _region_row(image_id: int, scene: Scene, masks: list[Image.Image]) -> Json:
    rows: list[Json] = []
    for thing, mask in zip(scene.things, masks, strict=True):
        left, top, right, bottom = mask.getbbox() or (0, 0, SIZE, SIZE)
        for phrase in region_phrases(thing, scene):
            rows.append(
                {
                    "region_id": image_id * 10 + len(rows),
                    "image_id": image_id,
                    "phrase": phrase,
                    "x": left,
                    "y": top,
                    "width": right - left,
                    "height": bottom - top,
                }
            )
    return {"id": image_id, "regions": rows}
