"""Reads the objects in pictures and their masks, in COCO's format of instances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from .annotations import read_annotations
from .sample import Instance

Json = dict[str, Any]


@dataclass(frozen=True)
class PictureInstances:
    """The objects in one picture.

    Attributes:
        image_id: Its id in the file.
        file_name: Its name in the folder of pictures.
        size: Its height and width in pixels.
        instances: Its objects; what the annotators took together as a crowd is one.
        crowds: Classes with a crowd.
    """

    image_id: str
    file_name: str
    size: tuple[int, int]
    instances: tuple[Instance, ...]
    crowds: frozenset[str]

    def share(self, category: str) -> float:
        """Share of the picture that all objects of a class cover together."""
        masks = [one.segmentation for one in self.instances if one.category == category]
        return float(coco_mask.area(coco_mask.merge(masks))) / (self.size[0] * self.size[1])


class InstanceFile:
    """A file `instances_<split>.json`.

    Masks are polygons or run lengths there; they are made run lengths picture by picture, when they are asked for.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_annotations(path, "images", "annotations", "categories")
        try:
            self._categories = {row["id"]: str(row["name"]) for row in content["categories"]}
            self._images = {row["id"]: row for row in content["images"]}
            self._annotations: dict[Any, list[Json]] = {number: [] for number in self._images}
            for row in content["annotations"]:
                self._annotations[row["image_id"]].append(row)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: an entry lacks {error}; is this COCO's format of instances?") from error

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the classes."""
        return tuple(self._categories.values())

    def pictures(self) -> Iterator[PictureInstances]:
        """All pictures, also those without objects, in the order of the file.

        Raises:
            ValueError: An object has no class or no mask.
        """
        for number, image in self._images.items():
            try:
                size = int(image["height"]), int(image["width"])
                instances = tuple(
                    Instance(self._categories[row["category_id"]], _run_lengths(row, size))
                    for row in self._annotations[number]
                )
                crowds = {self._categories[row["category_id"]] for row in self._annotations[number] if row["iscrowd"]}
                yield PictureInstances(str(number), str(image["file_name"]), size, instances, frozenset(crowds))
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}: an entry of picture {number} lacks {error}; is this COCO's format of instances?"
                ) from error
            except ValueError as error:
                raise ValueError(f"{self.path}: picture {number}: {error}") from error


def _run_lengths(row: Json, size: tuple[int, int]) -> Json:
    """A mask as compressed run lengths.

    Raises:
        ValueError: It has neither polygons nor run lengths, or is of another picture.
    """
    given = row["segmentation"]
    if isinstance(given, dict):
        if tuple(given["size"]) != size:
            raise ValueError(f"object {row['id']} has a mask of {given['size']} pixels in a picture of {list(size)}")
        return given if not isinstance(given["counts"], list) else dict(coco_mask.frPyObjects(given, *size))
    # Fewer than three points are no area, and pycocotools takes four numbers for a box.
    polygons = [polygon for polygon in given if len(polygon) >= 6]
    if not polygons:
        raise ValueError(f"object {row['id']} has no mask; leave it out of the file")
    return dict(coco_mask.merge(coco_mask.frPyObjects(polygons, *size)))
