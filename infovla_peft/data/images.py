"""Images between the disk and the model, a batch at a time: resized once to uint8, then shifted and normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

CROP_AREA = 0.9
"""Of OpenVLA's random crops in training, and so of its central crop at evaluation."""


def central_crop(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The central `CROP_AREA` of an image, as OpenVLA's evaluation makes it for models trained with random crops.

    First to `side` (Lanczos), then the crop back to `side`, bilinear, corner on corner (TensorFlow's
    `crop_and_resize`). Deviation: the original sends the picture through JPEG first.

    Args:
        image: (H, W, 3).
        side: of the result, in pixels.
    """
    picture = Image.fromarray(image)
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture, dtype=np.float64)
    margin = (1 - CROP_AREA**0.5) / 2
    places = np.linspace(margin, 1 - margin, side) * (side - 1)  # (side,)
    low = np.floor(places).astype(np.int64)
    high, weight = np.minimum(low + 1, side - 1), places - low
    rows = pixels[low] * (1 - weight)[:, None, None] + pixels[high] * weight[:, None, None]
    cropped = rows[:, low] * (1 - weight)[:, None] + rows[:, high] * weight[:, None]
    # TensorFlow's `convert_image_dtype` to uint8: of a float in [0, 1], the whole part of 255.5 times it.
    return np.floor(np.clip(cropped, 0, 255) * (255.5 / 255)).clip(0, 255).astype(np.uint8)  # type: ignore[no-any-return]


class ImagePipeline:
    """What an OpenVLA image processor does to one image, cut into a part that is done once and one done per batch.

    `normalise(resize(images))` equals the image processor's output bit for bit.

    Args:
        image_processor: an `OpenVLAImageProcessor`.
        crop: show the model the central crop of each image, see `central_crop`.

    Raises:
        ValueError: the vision transformers want images of different sizes.
    """

    def __init__(self, image_processor: Any, *, crop: bool = False) -> None:
        resizes = {str(params) for params in image_processor.tvf_resize_params}
        if len(resizes) != 1:
            raise ValueError(f"all vision transformers must resize images alike, found {sorted(resizes)}")
        self._processor, self._crop = image_processor, crop
        self.side: int = image_processor.input_sizes[0][-1]
        statistics = image_processor.tvf_normalize_params
        self._mean = torch.tensor([params["mean"] for params in statistics]).flatten()[:, None, None]
        self._std = torch.tensor([params["std"] for params in statistics]).flatten()[:, None, None]

    def resize(self, images: Sequence[Image.Image]) -> NDArray[np.uint8]:
        """Images in RGB → (N, 3, side, side) uint8."""
        arrays = [np.asarray(image.convert("RGB")) for image in images]
        if self._crop:
            arrays = [central_crop(array, self.side) for array in arrays]
        if any(array.shape[:2] != (self.side, self.side) for array in arrays):
            values = self._processor(arrays, return_tensors="pt")["pixel_values"][:, :3]
            pixels = (values * self._std[:3] + self._mean[:3]) * 255  # PIL resizes to whole numbers: they come back
            return pixels.round().to(torch.uint8).numpy()  # type: ignore[no-any-return]
        return np.ascontiguousarray(np.stack(arrays).transpose(0, 3, 1, 2))

    def normalise(self, images: Tensor) -> Tensor:
        """(B, cameras, 3, H, W) uint8 → (B, cameras · transformers · 3, H, W) float32."""
        transformers = len(self._mean) // 3
        pixels = images.float().div_(255)
        if transformers > 1:
            pixels = pixels.repeat(1, 1, transformers, 1, 1)
        return pixels.sub_(self._mean).div_(self._std).flatten(1, 2)


def random_shift(images: Tensor, shifts: Tensor) -> Tensor:
    """Move each sample's images by its own whole number of pixels, repeating the edges.

    All images of a sample move together. On any device.

    Args:
        images: (B, cameras, 3, H, W), any dtype.
        shifts: (B, 2) integers, downwards and to the right.

    >>> random_shift(torch.arange(3.).view(1, 1, 1, 1, 3), torch.tensor([[0, 1]])).flatten().tolist()
    [0.0, 0.0, 1.0]
    """
    batch, _, _, height, width = images.shape
    rows = (torch.arange(height, device=images.device) - shifts[:, :1]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width, device=images.device) - shifts[:, 1:]).clamp(0, width - 1)  # (B, W)
    flat = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, 1, -1)  # (B, 1, 1, H · W)
    return images.flatten(3).gather(3, flat.expand(*images.shape[:3], -1)).view_as(images)
