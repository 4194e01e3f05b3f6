"""Images and prompts as OpenVLA reads them, with PIL and torch alone (no torchvision, no timm)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

ImageLike = Image.Image | NDArray[np.uint8] | Tensor
PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
RESIZE_STRATEGIES = ("resize-naive", "resize-crop", "letterbox")
_PIL_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def build_prompt(instruction: str, template: str = "") -> str:
    """The prompt of an instruction.

    Args:
        template: text with {instruction} in it; "" for OpenVLA's own.

    >>> build_prompt("Open the drawer")
    'In: What action should the robot take to open the drawer?\\nOut:'
    """
    return (template or PROMPT).replace("{instruction}", instruction.lower())


class PrismaticImageProcessor(BaseImageProcessor):
    """Images as normalised pixel values, one stack of three channels per vision transformer.

    The class carries the hub's name, because transformers writes and looks up this name in
    `preprocessor_config.json`; it is exported as `OpenVLAImageProcessor` too.

    Args:
        use_fused_vision_backbone: two vision transformers.
        image_resize_strategy: "resize-naive" (squeeze to the square), "resize-crop" (shorter side, then the centre)
            or "letterbox" (pad to a square first).
        input_sizes: (3, side, side) per vision transformer.
        interpolations: name of PIL's filter per vision transformer.
        means, stds: of the channels, per vision transformer.
        kwargs: the entries `tvf_*` of a saved configuration, which are then used as they are.

    Raises:
        ValueError: unknown resize strategy or filter, or a size that is no square.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        use_fused_vision_backbone: bool = False,
        image_resize_strategy: str = "letterbox",
        input_sizes: Sequence[Sequence[int]] | None = None,
        interpolations: Sequence[str] | None = None,
        means: Sequence[Sequence[float]] | None = None,
        stds: Sequence[Sequence[float]] | None = None,
        **kwargs: Any,
    ) -> None:
        if image_resize_strategy not in RESIZE_STRATEGIES:
            raise ValueError(
                f"`image_resize_strategy='{image_resize_strategy}'` is unknown; choose one of {RESIZE_STRATEGIES}."
            )
        kwargs.pop("auto_map", None)
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.image_resize_strategy = image_resize_strategy
        self.input_sizes = [list(size) for size in input_sizes or [(3, 224, 224)]]
        self.interpolations = list(interpolations or ["bicubic"] * len(self.input_sizes))
        self.means = [list(mean) for mean in means or [(0.5, 0.5, 0.5)] * len(self.input_sizes)]
        self.stds = [list(std) for std in stds or [(0.5, 0.5, 0.5)] * len(self.input_sizes)]
        self.tvf_resize_params: list[dict[str, Any]] = []
        self.tvf_crop_params: list[dict[str, Any]] = []
        self.tvf_normalize_params: list[dict[str, Any]] = []
        for (_, height, width), name, mean, std in zip(
            self.input_sizes, self.interpolations, self.means, self.stds, strict=True
        ):
            if height != width or name not in _PIL_FILTERS:
                raise ValueError(
                    f"Cannot resize to {height} x {width} with filter '{name}': only squares and {_PIL_FILTERS}."
                )
            size = [height, width] if image_resize_strategy == "resize-naive" else height
            self.tvf_resize_params.append(
                {"size": size, "interpolation": _PIL_FILTERS[name], "max_size": None, "antialias": True}
            )
            self.tvf_crop_params.append({"output_size": [height, width]})
            # The hub's files hold float32 numbers; the same rounding gives the same pixels.
            self.tvf_normalize_params.append({"mean": _as_float32(mean), "std": _as_float32(std), "inplace": False})
        self.tvf_do_letterbox = image_resize_strategy == "letterbox"
        # As in the original, the last vision transformer's mean fills the border of all.
        fill = [int(value * 255) for value in self.means[-1]]
        self.tvf_letterbox_fill = fill if self.tvf_do_letterbox else None
        super().__init__(**kwargs)

    def preprocess(
        self,
        images: ImageLike | Sequence[ImageLike] | Sequence[Sequence[ImageLike]],
        return_tensors: str | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Pixel values of one image, of a batch of images, or of a batch of lists of images (several cameras).

        Args:
            images: PIL images, or uint8 arrays or tensors (height, width, 3) in RGB.
            return_tensors: "pt" for torch; None gives NumPy.

        Returns:
            `pixel_values` (batch, cameras * transformers * 3, side, side), float32: the channels of camera 1's
            image for each vision transformer, then those of camera 2 …
        """
        batch: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
        rows = [list(row) if isinstance(row, list | tuple) else [row] for row in batch]
        if len({len(row) for row in rows}) != 1:
            raise ValueError("Each sample needs the same number (at least one) of images.")
        flat = [_as_pil(image) for row in rows for image in row]
        if self.tvf_do_letterbox:
            flat = [_letterbox(image, tuple(self.tvf_letterbox_fill or ())) for image in flat]
        stacks: list[Tensor] = []
        resized: dict[str, Tensor] = {}  # both vision transformers mostly want the same size: resize once
        for resize, crop, normalize in zip(
            self.tvf_resize_params, self.tvf_crop_params, self.tvf_normalize_params, strict=True
        ):
            key = repr((resize, crop))
            if key not in resized:
                arrays = [np.asarray(_center_crop(_resize(image, resize), crop["output_size"])) for image in flat]
                pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()  # (images, 3, side, side)
                resized[key] = pixels.float().div_(255)
            mean = torch.tensor(normalize["mean"]).view(3, 1, 1)
            std = torch.tensor(normalize["std"]).view(3, 1, 1)
            stacks.append((resized[key] - mean).div_(std))
        pixel_values = torch.cat(stacks, dim=1) if len(stacks) > 1 else stacks[0]
        pixel_values = pixel_values.reshape(len(rows), -1, *pixel_values.shape[2:])
        return BatchFeature({"pixel_values": pixel_values if return_tensors == "pt" else pixel_values.numpy()})

    def apply_transform(self, image: ImageLike) -> Tensor:
        """Pixel values (transformers * 3, side, side) of one image."""
        return self.preprocess(image, return_tensors="pt")["pixel_values"][0]  # type: ignore[no-any-return]


class PrismaticProcessor(ProcessorMixin):
    """Image processor and tokeniser in one; exported as `OpenVLAProcessor` too (see `PrismaticImageProcessor`).

    Args:
        image_processor: an `OpenVLAImageProcessor`.
        tokenizer: the language model's tokeniser, padding on the right.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None) -> None:
        super().__init__(image_processor, tokenizer)  # type: ignore[no-untyped-call]

    def __call__(
        self,
        text: str | list[str],
        images: ImageLike | Sequence[ImageLike] | Sequence[Sequence[ImageLike]],
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """`input_ids`, `attention_mask` (batch, tokens) and `pixel_values` (see `OpenVLAImageProcessor.preprocess`).

        Raises:
            ValueError: not as many texts as samples of images.
        """
        pixel_values = self.image_processor(images, return_tensors=return_tensors)["pixel_values"]
        encoded = self.tokenizer(
            text, return_tensors=return_tensors, padding=padding, truncation=truncation, max_length=max_length
        )
        texts = 1 if isinstance(text, str) else len(text)
        if len(pixel_values) != texts:
            raise ValueError(f"As many images as texts are needed, got {len(pixel_values)} and {texts}.")
        return BatchFeature({**encoded, "pixel_values": pixel_values})

    @property
    def model_input_names(self) -> list[str]:
        return list(dict.fromkeys([*self.tokenizer.model_input_names, *self.image_processor.model_input_names]))

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save as transformers 5 does, and beside it the `preprocessor_config.json` that OpenVLA's folders have."""
        self.image_processor.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


OpenVLAImageProcessor = PrismaticImageProcessor
OpenVLAProcessor = PrismaticProcessor


def _as_float32(values: Sequence[float]) -> list[float]:
    return [float(np.float32(value)) for value in values]


def rgb_pixels(image: Any) -> NDArray[np.uint8]:
    """An image (see `ImageLike`) as RGB (height, width, 3).

    Raises:
        ValueError: it is no image, is empty, or holds something else than bytes, whose range would be a guess.
    """
    if isinstance(image, Image.Image):
        if image.mode.startswith(("F", "I")):  # PIL would cut these off at 255
            raise ValueError(
                f"A PIL image of mode {image.mode!r} holds no bytes; scale it to 0 … 255 and convert it to 'RGB'."
            )
        image = image.convert("RGB")
    elif isinstance(image, Tensor) and image.dtype == torch.uint8:
        image = image.numpy(force=True)
    pixels = image if isinstance(image, Tensor) else np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(
            "An image must be a PIL image or a uint8 array (height, width, 3) of at least one pixel, got "
            f"{pixels.dtype} {tuple(pixels.shape)}."
        )
    return pixels


def _as_pil(image: ImageLike) -> Image.Image:
    return Image.fromarray(rgb_pixels(image))


def _letterbox(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    # An odd difference leaves the padded image one pixel short of a square, as in the original.
    side = max(image.size)
    horizontal, vertical = (int((side - length) / 2) for length in image.size)
    return ImageOps.expand(image, border=(horizontal, vertical, horizontal, vertical), fill=fill)


def _resize(image: Image.Image, params: dict[str, Any]) -> Image.Image:
    size = params["size"]
    if isinstance(size, int):
        width, height = image.size
        short, long = min(width, height), max(width, height)
        scaled = int(size * long / short)
        target = (size, scaled) if width <= height else (scaled, size)
    else:
        target = (size[1], size[0])
    return image if image.size == target else image.resize(target, params["interpolation"])


def _center_crop(image: Image.Image, size: Sequence[int]) -> Image.Image:
    (width, height), (crop_height, crop_width) = image.size, size
    if (height, width) == (crop_height, crop_width):
        return image
    top, left = round((height - crop_height) / 2.0), round((width - crop_width) / 2.0)
    return image.crop((left, top, left + crop_width, top + crop_height))
