"""How Molmo sees a picture: once as a whole, then in overlapping crops of a larger copy.

Notation: a tiling has i rows and j columns of crops; P patches along one side of a crop, two of which become one visual
token; l and r are the margins, in patches, that neighbouring crops share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import BaseImageProcessor, BatchFeature
from transformers.image_utils import make_flat_list_of_images

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Marks crops that pad a batch, visual tokens that are left out, and masks that the original has none for.
_NONE = -1


class MolmoImageProcessor(BaseImageProcessor):
    """Turns pictures into normalised crops, and says where their visual tokens go.

    The arguments are called as in the published `preprocessor_config.json`.

    Args:
        base_image_input_size: Height and width of a crop in pixels, which are the same.
        image_patch_size: Height and width of a patch in pixels.
        max_crops: Crops at most, beside the whole picture.
        overlap_margins: Patches at the left or top and at the right or bottom of a crop that lie in its neighbour too.
        image_mean: Mean of each color.
        image_std: Standard deviation of each color.
        **kwargs: What every image processor has.
    """

    model_input_names = ["pixel_values", "image_masks", "patch_numbers"]  # noqa: RUF012 - as in the base class

    def __init__(
        self,
        base_image_input_size: Sequence[int] = (336, 336),
        image_patch_size: int = 14,
        max_crops: int = 12,
        overlap_margins: Sequence[int] = (4, 4),
        image_mean: Sequence[float] = _CLIP_MEAN,
        image_std: Sequence[float] = _CLIP_STD,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("auto_map", None)  # names the code that is not run
        super().__init__(**kwargs)
        self.base_image_input_size = list(base_image_input_size)
        self.image_patch_size = image_patch_size
        self.max_crops = max_crops
        self.overlap_margins = list(overlap_margins)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    @property
    def tokens_per_side(self) -> int:
        """Visual tokens along one side of a crop."""
        return self.base_image_input_size[0] // self.image_patch_size // 2

    def tiling(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of crops that a picture of this size in pixels is cut into.

        The tiling is taken that enlarges the picture least; if all would shrink it, the one that shrinks it least.
        """
        counts = range(1, self.max_crops + 1)
        tilings = [(i, j) for i in counts for j in counts if i * j <= self.max_crops]
        tilings.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
        inside = torch.tensor([height - self._margin, width - self._margin], dtype=torch.float32)
        # In float32, as the original: another precision breaks ties in another way.
        scales = (torch.tensor(tilings, dtype=torch.float32) * self._window / inside).amin(dim=1)
        if (scales < 1).all():
            return tilings[int(scales.argmax())]
        return tilings[int(torch.where(scales < 1, 1e10, scales).argmin())]

    def token_grid(self, tiling: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of visual tokens that the crops of a tiling have together, without those shared."""
        left, right = (margin // 2 for margin in self.overlap_margins)
        window = self.tokens_per_side - left - right
        return tiling[0] * window + left + right, tiling[1] * window + left + right

    def preprocess(self, images: Any) -> BatchFeature:
        """Process B pictures.

        Args:
            images: PIL images.

        Returns:
            `pixel_values` [B, C, 3, height, width] with the whole picture first, `image_masks` [B, C, P²] and
            `patch_numbers` [B, C, (P / 2)²] as the model takes them. Pictures with fewer crops are filled with −1.
        """
        pictures: Any = make_flat_list_of_images(images)
        processed = [self._process(picture) for picture in pictures]
        tensors = (torch.nn.utils.rnn.pad_sequence(list(one), True, _NONE) for one in zip(*processed, strict=True))
        return BatchFeature(dict(zip(self.model_input_names, tensors, strict=True)))

    @property
    def _margin(self) -> int:
        """Pixels of both margins."""
        return sum(self.overlap_margins) * self.image_patch_size

    @property
    def _window(self) -> int:
        """Pixels from one crop to the next."""
        return self.base_image_input_size[0] - self._margin

    def _process(self, image: Image.Image) -> tuple[Tensor, Tensor, Tensor]:
        """Crops, masks and numbers of one picture."""
        size, (i, j) = self.base_image_input_size[0], self.tiling(image.width, image.height)
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
        whole, _ = _fit(pixels, size, size)
        large, is_picture = _fit(pixels, self._window * i + self._margin, self._window * j + self._margin)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        crops = (torch.cat([whole[None], self._cut(large)]) - mean) / std
        covered = functional.avg_pool2d(self._cut(is_picture[None])[:, 0], self.image_patch_size).flatten(1)
        # The original appends the mask of the whole picture, which itself comes first: every crop has the mask of the
        # one after it, and the last has none. The weights were trained so.
        masks = torch.cat([covered, covered.new_full((1, covered.shape[1]), _NONE)])
        return crops, masks, self._numbers(i, j)

    def _cut(self, picture: Tensor) -> Tensor:
        """Overlapping crops [i · j, channels, size, size] of a picture [channels, height, width], row by row."""
        size = self.base_image_input_size[0]
        crops = picture.unfold(1, size, self._window).unfold(2, size, self._window)
        return crops.permute(1, 2, 0, 3, 4).flatten(0, 1)

    def _numbers(self, i: int, j: int) -> Tensor:
        """Number of each crop's visual tokens in the text [1 + i · j, V], −1 where a neighbour has the token."""
        side = self.tokens_per_side
        rows, columns = self.token_grid((i, j))
        whole = torch.arange(side**2).reshape(1, side, side)
        shared = whole.numel() + torch.arange(rows * columns).reshape(1, rows, columns)
        left, right = (margin // 2 for margin in self.overlap_margins)
        window = side - left - right
        crops = shared.unfold(1, side, window).unfold(2, side, window)[0].clone()
        crops[1:, :, :left] = _NONE
        crops[:, 1:, :, :left] = _NONE
        crops[:-1, :, side - right :] = _NONE
        crops[:, :-1, :, side - right :] = _NONE
        return torch.cat([whole, crops.flatten(0, 1)]).flatten(1)


def _fit(pixels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Resize a picture [3, h, w] into a frame, keeping its proportions, and pad it with black.

    Returns:
        The frame [3, height, width], and 1 where the picture is and 0 elsewhere [height, width].
    """
    old = [np.float32(length) for length in pixels.shape[1:]]
    scale = min(np.float32(height) / old[0], np.float32(width) / old[1])
    # Cut off rather than rounded, as the original; of a very narrow picture a line is left.
    down, across = (max(int(length * scale), 1) for length in old)
    resized = functional.interpolate(pixels[None], (down, across), mode="bilinear", antialias=True)[0].clamp(0, 1)
    top, left = (height - down) // 2, (width - across) // 2
    frame, is_picture = pixels.new_zeros(3, height, width), pixels.new_zeros(height, width)
    frame[:, top : top + down, left : left + across] = resized
    is_picture[top : top + down, left : left + across] = 1
    return frame, is_picture
