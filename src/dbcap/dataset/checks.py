"""What may be wrong with a photo: near-duplicates, blur, too few pixels, an extreme shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

BLURRED = 0.08
"""Sharpness below which a photo is reported. 14 real photos of dogs and toys have 0.114 to 1.51; blurred by 2 pixels of
512 (Gaussian) the same have at most 0.065."""
NEAR_BITS = 10
NEAR_COLOUR = 20.0
"""What near-duplicates differ by at most. Of the same 14 photos: copies saved again, scaled, 15 % brighter or darker or
turned by 2 degrees 8 bits and a colour of 19, most of those cut by 5 % 10 bits; photos of one subject at least 18 bits
and 27. Of drawings on plain ground, which the bits hardly tell apart, colours differ by 22 and more."""
EXTREME = 2.0
"""Longer side to the shorter one."""
_HASH = 32
_KEPT = 8
_COLOURS = 8
_SHARPNESS_SIDE = 256


@dataclass(frozen=True)
class Print:
    """What tells pictures apart: 63 bits (low frequencies of grey above their median) and colours (8, 8, 3)."""

    bits: npt.NDArray[np.bool_]
    colours: npt.NDArray[np.float64]

    def is_near(self, other: Print) -> bool:
        """Return whether two pictures are nearly the same."""
        bits = int(np.count_nonzero(self.bits != other.bits))
        return bits <= NEAR_BITS and float(np.abs(self.colours - other.colours).mean()) <= NEAR_COLOUR


def print_of(image: Image.Image) -> Print:
    """Return the print of a whole RGB picture: a perceptual hash by the discrete cosine transform, and its colours."""
    grey = np.asarray(image.convert("L").resize((_HASH, _HASH), Image.Resampling.LANCZOS), np.float64)
    basis = np.cos(np.pi / _HASH * np.outer(np.arange(_KEPT), np.arange(_HASH) + 0.5))
    low = (basis @ grey @ basis.T).ravel()[1:]
    low[np.abs(low) < 1e-6] = 0  # a plain picture: rounding is no pattern
    colours = np.asarray(image.resize((_COLOURS, _COLOURS), Image.Resampling.BOX), np.float64)
    return Print(low > np.median(low), colours)


def prints_of(image: Image.Image) -> tuple[Print, Print]:
    """Return the print of a picture, and that of its mirror image."""
    return print_of(image), print_of(ImageOps.mirror(image))


def near(prints: tuple[Print, Print], others: Sequence[tuple[Print, Print]]) -> tuple[int, bool] | None:
    """Return which of the other pictures is nearly the same, and whether it is mirrored; None where none is."""
    for number, (other, _) in enumerate(others):
        for mirrored, own in enumerate(prints):
            if own.is_near(other):
                return number, bool(mirrored)
    return None


def sharpness(image: Image.Image) -> float:
    """Return the variance of the Laplacian of grey by that of grey itself, which contrast does not change.

    Measured with a shorter side of at most 256 pixels, so that it hardly depends on a photo's size.
    """
    scale = min(1.0, _SHARPNESS_SIDE / min(image.size))
    small = [max(3, round(length * scale)) for length in image.size]
    grey = np.asarray(image.convert("L").resize((small[0], small[1]), Image.Resampling.LANCZOS), np.float64)
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * grey[1:-1, 1:-1]).var() / max(grey.var(), 1.0))


def doubts(image: Image.Image, size: int, crop: str) -> list[str]:
    """Return what is doubtful about a photo by itself, each in a few words."""
    found = []
    shorter, longer = sorted(image.size)
    scaled = longer if crop == "pad" else shorter
    if scaled < size:
        found.append(f"too small: {image.width}x{image.height} is scaled up to {size}")
    if longer > EXTREME * shorter:
        lost = {"pad": "most of it becomes border", "none": "training sees a part at a time"}
        found.append(f"extreme shape, {image.width}x{image.height}: {lost.get(crop, 'most of it is cut off')}")
    if sharpness(image) < BLURRED:
        found.append("blurred")
    return found
