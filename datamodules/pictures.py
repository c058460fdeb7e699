"""Pictures of a folder, with nothing said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from .base import PictureDataModule
from .captioning import CAPTION_PROMPT
from .sample import Sample


class PicturesDataModule(PictureDataModule):
    """All pictures in a folder and the folders in it, in the order of their names; each is asked the same.

    A sample's id is the path of its picture from `root` on. Files are pictures if their ending says so; hidden ones are
    left out.

    Args:
        root: The folder; or one picture.
        prompt: What the model is asked.
        **loading: `limit` and how batches are loaded, see `PictureDataModule`.
    """

    def __init__(self, root: str, prompt: str = CAPTION_PROMPT, **loading: Any) -> None:
        super().__init__(root, prompt, "all", "all", "all", "all", **loading)

    def setup(self, stage: str) -> None:
        """List the pictures.

        Raises:
            FileNotFoundError: There is neither folder nor picture at `root`.
            ValueError: There is no picture in it.
        """
        if self.root.is_dir():
            super().setup(stage)
        elif self.root.is_file():
            self._samples |= {part: self._read_all(part) for part in self._parts(stage)}
        else:
            raise FileNotFoundError(f"{self.root}: no such folder or picture; set --data.init_args.root")

    def read(self, split: str, training: bool) -> list[Sample]:
        """All pictures; see the class for what a sample is."""
        if self.root.is_file():
            return [self._sample(self.root, self.root.name)]
        # Some kinds can be written only.
        endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        files = [path.relative_to(self.root) for path in self.root.rglob("*") if path.suffix.lower() in endings]
        names = sorted(path.as_posix() for path in files if not any(part.startswith(".") for part in path.parts))
        found = [self._sample(path, name) for name in names if (path := self.root / name).is_file()]
        if not found:
            raise ValueError(f"{self.root}: no pictures in this folder; is --data.init_args.root right?")
        return found

    def _sample(self, path: Path, name: str) -> Sample:
        return Sample(sample_id=name, image=path, prompt=self.prompt, target="")
