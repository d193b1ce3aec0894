"""Photos brought to the size that a model is trained at. Nothing is squashed; sizes are in pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

_SMALL = 128
"""Shorter side of the picture in which detail is looked for."""
_BLUR = 1 / 24
"""Radius of a border's blur, of the size."""


def cropped(image: Image.Image, how: str, size: int) -> Image.Image:
    """Return an RGB picture as `--crop` says: size x size, or with `none` the shorter side `size`."""
    return _HOW[how](image, size)


def _center(image: Image.Image, size: int) -> Image.Image:
    return _square(image, size, (image.width - image.height) / 2)


def _smart(image: Image.Image, size: int) -> Image.Image:
    """Cut out the square with the most detail: the largest sum of differences between neighbouring pixels.

    They are looked for in a small grey copy, so that noise counts little; of equal squares the one nearest to the
    center is taken.
    """
    side = min(image.size)
    scale = min(1.0, _SMALL / side)
    small = [max(1, round(length * scale)) for length in image.size]
    grey = np.asarray(image.convert("L").resize(small, Image.Resampling.BOX), np.int64)
    detail = _detail(grey).sum(axis=0 if image.width > image.height else 1)
    window = min(small)
    ahead = np.concatenate([[0], np.cumsum(detail)])
    sums = ahead[window:] - ahead[:-window]
    middle = (len(sums) - 1) / 2
    best = min(np.flatnonzero(sums == sums.max()), key=lambda start: (abs(start - middle), start))
    longer = max(image.size)
    shift = (longer - side) * (best / (len(sums) - 1)) if len(sums) > 1 else 0.0
    return _square(image, size, shift)


def _detail(grey: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return, of every pixel of (H, W), the differences to the one on its left and the one above."""
    detail = np.zeros_like(grey)
    detail[:, 1:] += np.abs(np.diff(grey, axis=1))
    detail[1:] += np.abs(np.diff(grey, axis=0))
    return detail


def _square(image: Image.Image, size: int, shift: float) -> Image.Image:
    """Cut out a square as large as the shorter side, `shift` pixels along the longer one."""
    side = min(image.size)
    left, top = (abs(shift), 0.0) if image.width > image.height else (0.0, abs(shift))
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def _pad(image: Image.Image, size: int) -> Image.Image:
    """Add a border on both sides: the picture mirrored at its edge, and blurred, so that it holds no second subject."""
    longer = max(image.size)
    width, height = (max(1, round(length * size / longer)) for length in image.size)
    whole = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (size - width) // 2, (size - height) // 2
    border = ((top, size - height - top), (left, size - width - left), (0, 0))
    padded = Image.fromarray(np.pad(np.asarray(whole), border, mode="symmetric"))
    padded = padded.filter(ImageFilter.GaussianBlur(size * _BLUR))
    padded.paste(whole, (left, top))
    return padded


def _none(image: Image.Image, size: int) -> Image.Image:
    shorter = min(image.size)
    sides = [max(size, round(length * size / shorter)) for length in image.size]
    return image.resize((sides[0], sides[1]), Image.Resampling.LANCZOS)


_HOW: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "center": _center,
    "smart": _smart,
    "pad": _pad,
    "none": _none,
}
