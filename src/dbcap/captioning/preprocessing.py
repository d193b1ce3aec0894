"""From an image to a model's pixels as preprocessor_config.json says. Pillow and numpy, no torch.

What transformers' Pillow processors do, number by number: resize, crop the middle, rescale, normalise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dbcap.errors import ModelError


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image; None leaves a step out."""

    size: tuple[int, int] | int | None
    """(height, width), or the shorter edge."""
    resample: int
    crop: tuple[int, int] | None
    """(height, width)."""
    scale: float | None
    mean: npt.NDArray[np.float32] | None
    std: npt.NDArray[np.float32] | None

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> Preprocessing:
        """Read a config that names all it needs. Raises ModelError for one that does not, or for another kind."""
        try:
            resizes = config.get("do_resize", True)
            crops = config.get("do_center_crop", False)
            normalises = config.get("do_normalize", True)
            return cls(
                size=_size(config["size"]) if resizes else None,
                resample=int(config["resample"]) if resizes else 0,
                crop=_sides(config["crop_size"]) if crops else None,
                scale=float(config["rescale_factor"]) if config.get("do_rescale", True) else None,
                mean=_channels(config["image_mean"]) if normalises else None,
                std=_channels(config["image_std"]) if normalises else None,
            )
        except (LookupError, TypeError, ValueError) as error:
            raise ModelError(f"{where} has a preprocessor_config.json that dbcap does not know: {error}") from error

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """RGB image -> float32 (3, H, W)."""
        if self.size is not None:
            width, height = self._target(image)
            image = image.resize((width, height), Image.Resampling(self.resample))
        pixels = np.moveaxis(np.array(image), -1, 0)
        if self.crop:
            pixels = _cropped(pixels, *self.crop)
        values = pixels.astype(np.float32)
        if self.scale is not None:
            values = (pixels.astype(np.float64) * self.scale).astype(np.float32)
        if self.mean is not None and self.std is not None:
            values = (values - self.mean[:, None, None]) / self.std[:, None, None]
        return np.ascontiguousarray(values, np.float32)

    def _target(self, image: Image.Image) -> tuple[int, int]:
        """Return width and height after resizing."""
        if isinstance(self.size, tuple):
            return self.size[1], self.size[0]
        assert self.size is not None
        width, height = image.size
        longer = int(self.size * max(width, height) / min(width, height))
        return (self.size, longer) if width <= height else (longer, self.size)


def _size(size: Any) -> tuple[int, int] | int:
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"])
    return _sides(size)


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if set(size) != {"height", "width"}:
        raise ValueError(f"a size of {size}")
    return int(size["height"]), int(size["width"])


def _channels(values: Any) -> npt.NDArray[np.float32]:
    return np.broadcast_to(np.asarray(values, np.float32), (3,))


def _cropped(pixels: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Cut out the middle; what is too small gets a black border."""
    missing = [max(0, height - pixels.shape[1]), max(0, width - pixels.shape[2])]
    before = [-(-number // 2) for number in missing]
    border = [(one, number - one) for one, number in zip(before, missing, strict=True)]
    pixels = np.pad(pixels, [(0, 0), *border])
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width]
