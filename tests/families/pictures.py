"""Stand-ins for image processors of transformers that need torchvision: the same tensors, by NumPy, PIL or torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.processing_utils import ImagesKwargs


def _cut(picture: Any, edge: int) -> list[Any]:
    """The square tiles of a picture [C, H, W], row by row."""
    height, width = picture.shape[-2:]
    return [picture[:, y : y + edge, x : x + edge] for y in range(0, height, edge) for x in range(0, width, edge)]


def least_enlarged(height: int, width: int, edge: int, most: int) -> tuple[int, int]:
    """The grid that a picture fits into with the least enlargement, or else with the least reduction."""
    grids = [(rows, columns) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]
    grids.sort(key=lambda grid: grid[0] * grid[1])  # of equals the one with fewer tiles
    scales = [min(rows * edge / height, columns * edge / width) for rows, columns in grids]
    enlarging = [scale for scale in scales if scale >= 1]
    return grids[scales.index(min(enlarging) if enlarging else max(scales))]


class Cohere2VisionPictures(GotOcr2ImageProcessorPil):
    """A stand-in for Cohere2VisionImageProcessor, which needs torchvision: the tiles, then the whole picture."""

    patch_size = 2  # visual tokens along a tile's edge

    def crop_image_to_patches(
        self,
        image: Any,
        min_patches: int,
        max_patches: int,
        use_thumbnail: bool = True,
        patch_size: Any = None,
        resample: Any = None,
    ) -> list[Any]:
        edge = patch_size.height
        height, width = image.shape[-2:]
        rows, columns = least_enlarged(height, width, edge, max_patches)
        tiles = _cut(self.resize(image, SizeDict(height=rows * edge, width=columns * edge), resample), edge)
        return tiles if len(tiles) == 1 else [*tiles, self.resize(image, patch_size, resample)]


class Llama4Pictures(GotOcr2ImageProcessorPil):
    """A stand-in for Llama4ImageProcessor, which needs torchvision.

    The picture lies, undistorted, at the top left of a canvas of tiles; of several tiles the whole picture,
    stretched to a tile, is the last.
    """

    def _preprocess(  # type: ignore[override]
        self, images: list[Any], size: Any, resample: Any, max_patches: int, return_tensors: str, **options: Any
    ) -> BatchFeature:
        edge = size.height
        tiles, grids = [], []
        for image in images:
            height, width = image.shape[-2:]
            rows, columns = least_enlarged(height, width, edge, max_patches)
            # A picture is enlarged to one tile at most.
            scale = min(
                min(max(height, edge), rows * edge) / height,
                min(max(width, edge), columns * edge) / width,
            )
            shape = SizeDict(height=int(height * scale + 1e-9), width=int(width * scale + 1e-9))
            padding = ((0, 0), (0, rows * edge - shape.height), (0, columns * edge - shape.width))
            of_image = _cut(np.pad(self.resize(image, shape, resample), padding), edge)
            if len(of_image) > 1:
                of_image.append(self.resize(image, size, resample))
            of_image = [self.rescale(tile, options["rescale_factor"]) for tile in of_image]
            tiles += [self.normalize(tile, options["image_mean"], options["image_std"]) for tile in of_image]
            grids.append([rows, columns])
        data = {"pixel_values": np.stack(tiles), "aspect_ratios": grids}
        return BatchFeature(data, tensor_type=return_tensors)


def _patches(image: Any, size: int) -> Any:
    """The patches [rows, columns, values] of a picture [3, height, width], colours last as its pixels are read."""
    channels, height, width = image.shape
    grid = image.reshape(channels, height // size, size, width // size, size)
    return grid.transpose(1, 3, 2, 4, 0).reshape(height // size, width // size, -1)


class Molmo2Pictures(PilBackend):
    """A stand-in for Molmo 2's image processor, which needs torchvision: the same tensors, by torch and numpy.

    A picture becomes one crop of the whole and up to four crops of 7 × 7 patches of 8 pixels that share a margin;
    2 × 2 patches are pooled to a visual token.
    """

    do_convert_rgb = True
    patch_size, crop, margin, max_crops = 8, 7, 1, 4

    def _preprocess(  # type: ignore[override]
        self, images: list[Any], return_tensors: str, **_: Any
    ) -> BatchFeature:
        crops: list[Any] = []
        pooling, grids, counts = [], [], []
        inner = self.crop - 2 * self.margin
        for image in images:
            rows, columns = self._tiling(*image.shape[1:])
            shape = (rows * inner + 2 * self.margin, columns * inner + 2 * self.margin)
            whole, canvas = self._resized(image, (self.crop, self.crop)), self._resized(image, shape)
            # The crop that owns a patch of the canvas, and the patch's place in it.
            y, x = np.indices(shape)
            row = ((y - self.margin) // inner).clip(0, rows - 1)
            column = ((x - self.margin) // inner).clip(0, columns - 1)
            inside = (y - row * inner) * self.crop + x - column * inner
            first = len(crops) * self.crop**2
            low, high = (
                self._pooled(first + index)
                for index in (
                    np.arange(self.crop**2).reshape(self.crop, self.crop),
                    (1 + row * columns + column) * self.crop**2 + inside,
                )
            )
            tiles = [(r * inner, c * inner) for r in range(rows) for c in range(columns)]
            crops += [whole, *(canvas[r : r + self.crop, c : c + self.crop] for r, c in tiles)]
            pooling += [low.reshape(-1, 4), high.reshape(-1, 4)]
            grids.append([*low.shape[:2], *high.shape[:2]])
            counts.append(1 + len(tiles))
        data = {
            "pixel_values": np.stack(crops).reshape(len(crops), self.crop**2, -1),
            "image_token_pooling": np.concatenate(pooling),
            "image_grids": np.array(grids),
            "image_num_crops": np.array(counts),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _tiling(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of crops that need the least enlarging or, where all shrink the picture, the least of it."""
        most, side = self.max_crops, (self.crop - 2 * self.margin) * self.patch_size
        edge = 2 * self.margin * self.patch_size
        tilings = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
        tilings.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
        scales = {tiling: side * min(tiling[0] / (height - edge), tiling[1] / (width - edge)) for tiling in tilings}
        enough = [tiling for tiling in tilings if scales[tiling] >= 1]
        return min(enough, key=scales.__getitem__) if enough else max(tilings, key=scales.__getitem__)

    def _resized(self, image: Any, grid: tuple[int, int]) -> Any:
        """The patches of a picture brought to some rows and columns of them, without antialiasing, from −1 to 1."""
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        pixels = torch.nn.functional.interpolate(torch.tensor(image[None]).float(), size, mode="bilinear")[0]
        return _patches(pixels.round().clamp(0, 255).numpy() / 127.5 - 1, self.patch_size)

    @staticmethod
    def _pooled(index: Any) -> Any:
        """The patches [rows, columns, 4] of each visual token, −1 where an odd edge leaves none."""
        edges = [((side % 2) // 2, side % 2) for side in index.shape]
        padded = np.pad(index, edges, constant_values=-1)
        rows, columns = (side // 2 for side in padded.shape)
        return padded.reshape(rows, 2, columns, 2).transpose(0, 2, 1, 3).reshape(rows, columns, 4)


class TiledKwargs(ImagesKwargs, total=False):
    """What LFM2-VL's processor asks its image processor for besides pixels; the stand-in always tells it."""

    return_row_col_info: bool


class Lfm2VlPictures(PilBackend):
    """A stand-in for LFM2-VL's image processor, which needs torchvision: the same tensors, by PIL and numpy.

    Large pictures become two to six tiles of 2 × 2 visual tokens and a small version of the whole; a visual token
    is 2 × 2 patches of 8 pixels.
    """

    valid_kwargs = TiledKwargs
    do_convert_rgb = use_thumbnail = True
    downsample_factor, encoder_patch_size, tile_size = 2, 8, 32
    min_image_tokens, max_image_tokens, max_tiles, tolerance = 4, 8, 6, 2.0

    def _preprocess(  # type: ignore[override]
        self, images: list[Any], return_tensors: str, **_: Any
    ) -> BatchFeature:
        parts, rows, columns, sizes = [], [], [], []
        for image in images:
            height, width = image.shape[1:]
            small = self._small(height, width)
            token = self.encoder_patch_size * self.downsample_factor
            tokens = round(height / token) * round(width / token)
            n, m = self._grid(height, width) if tokens > self.max_image_tokens * self.tolerance else (1, 1)
            if n * m > 1:
                canvas = self._patches(image, n * self.tile_size, m * self.tile_size)
                side = self.tile_size // self.encoder_patch_size
                tiles = canvas.reshape(n, side, m, side, -1).transpose(0, 2, 1, 3, 4)
                parts += list(tiles.reshape(n * m, side, side, -1))
            parts.append(self._patches(image, *small))
            rows.append(n)
            columns.append(m)
            sizes.append(small)
        most = self.max_image_tokens * self.downsample_factor**2
        flat = [part.reshape(-1, part.shape[-1]) for part in parts]
        data = {
            "pixel_values": np.stack([np.pad(part, ((0, most - len(part)), (0, 0))) for part in flat]),
            "pixel_attention_mask": np.stack([np.arange(most) < len(part) for part in flat]).astype(np.int32),
            "spatial_shapes": np.array([part.shape[:2] for part in parts]),
            "image_rows": rows,
            "image_cols": columns,
            "image_sizes": sizes,
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _small(self, height: int, width: int) -> tuple[int, int]:
        """The size at which a whole picture has as many visual tokens as are allowed."""
        token = self.encoder_patch_size * self.downsample_factor
        area, sides = height * width / token**2, [max(1, round(side / token)) for side in (height, width)]
        if sides[0] * sides[1] > self.max_image_tokens:
            scale = (self.max_image_tokens / area) ** 0.5
            sides = [max(1, int(side * scale / token)) for side in (height, width)]
        elif sides[0] * sides[1] < self.min_image_tokens:
            scale = (self.min_image_tokens / area) ** 0.5
            sides = [-int(-side * scale // token) for side in (height, width)]
        return sides[0] * token, sides[1] * token

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles that are nearest to the picture's shape; up to six tiles no two shapes agree."""
        grids = [(n, m) for n in range(1, 7) for m in range(1, 7) if 2 <= n * m <= self.max_tiles]
        return min(grids, key=lambda grid: abs(width / height - grid[1] / grid[0]))

    def _patches(self, image: Any, height: int, width: int) -> Any:
        size = SizeDict(height=height, width=width)
        pixels = self.resize(image, size, resample=PILImageResampling.BILINEAR)
        return _patches(pixels / np.float32(127.5) - 1, self.encoder_patch_size)
