"""Images of all kinds that Python code hands over, read in batches: ahead of the model, or only when asked for."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from dbcap import images as reader
from dbcap import web
from dbcap.captioning import reading
from dbcap.captioning.reading import Prepared, ToPixels
from dbcap.config.models import CaptionConfig
from dbcap.errors import InputError
from dbcap.images import Picture
from dbcap.inputs import Source, shown
from dbcap.pixels import HOSTILE, finish

ImageLike = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]
"""A path, an http(s) URL, the bytes of an image file, a PIL image, or RGB pixels as uint8 (H, W, 3)."""
IMAGES = "an image is a path, a URL, the bytes of a file, a PIL image or an array of uint8 (height, width, 3)"
_one_at_a_time = threading.Lock()


@dataclass(frozen=True, slots=True)
class Item(Source):
    """One image to caption; `name` is what errors call it."""

    image: Any = None


def is_image(value: object) -> bool:
    """Tell whether a value stands for one image, not for several."""
    if isinstance(value, np.ndarray):
        return value.ndim != 4
    return isinstance(value, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)


def item_of(image: Any, place: int | None = None) -> Item:
    """Name an image by its path or URL, else by its place in `images`."""
    if isinstance(image, str | os.PathLike):
        return Item(web.without_credentials(shown(os.fsdecode(image))), image=image)
    return Item("the image" if place is None else f"images[{place}]", image=image)


def batches(
    items: Sequence[Item] | Iterator[Item], work: Callable[[Source], Prepared], *, size: int, workers: int
) -> Generator[list[Prepared]]:
    """Yield groups of `size` in order, each prepared by `work` in `workers` threads (0: in turn).

    Of a sequence the next groups are read while the caller is busy; of an iterator no more is taken than a group.
    """
    if isinstance(items, Sequence):
        parts: Iterator[Sequence[Item]] = iter([items])
        ahead = workers + 2 * size
    else:
        parts, ahead = _parts(items, size), size
    for part in parts:
        with closing(reading.in_order(part, work, min(workers, len(part)), ahead)) as prepared:
            while group := list(islice(prepared, size)):
                yield group


def _parts(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Cut a stream. Where it fails, what came before goes out first."""
    part: list[Item] = []
    try:
        for item in items:
            part.append(item)
            if len(part) == size:
                yield part
                part = []
    except Exception:
        if part:
            yield part
        raise
    if part:
        yield part


def prepare(source: Source, read: Callable[[Any], Picture], to_pixels: ToPixels) -> Prepared:
    """Read an image and turn it into pixels; one that cannot be read comes back with its error."""
    assert isinstance(source, Item)
    return reading.prepared(source, lambda: read(source.image), to_pixels)


def stacked(group: Sequence[Prepared], rows: int) -> npt.NDArray[np.float32]:
    """Return the pixels of a group as (rows, 3, H, W): the last image stands again in the rows that are missing."""
    pixels = [item.pixels for item in group if item.pixels is not None]
    return np.stack(pixels + pixels[-1:] * (rows - len(pixels)))


def picture_of(image: Any, config: CaptionConfig) -> Picture:
    """Read an `ImageLike`: upright RGB in sRGB, within the limits of `config`. Raises InputError."""
    if isinstance(image, str | os.PathLike):
        name = os.fsdecode(image)
        if "://" not in name or os.path.lexists(name):
            return reader.read(name, alpha=config.alpha, max_pixels=config.max_pixels)
        image = web.fetch(name, timeout=config.url_timeout, max_bytes=config.url_max_mb * 1_000_000)
    if isinstance(image, bytes | bytearray | memoryview):
        return reader.read_bytes(bytes(image), alpha=config.alpha, max_pixels=config.max_pixels)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(f"is an array of {image.dtype} {image.shape}", IMAGES, kind="unsupported")
        image = Image.fromarray(np.ascontiguousarray(image))
    if isinstance(image, Image.Image):
        return from_pillow(image, config)
    raise InputError(f"is no image but of the type {type(image).__name__}", IMAGES, kind="unsupported")


def from_pillow(image: Image.Image, config: CaptionConfig) -> Picture:
    """Treat a PIL image as the reader treats that of a file; it is left as it is. Raises InputError.

    Its hash, by which sampling draws, is that of its pixels.
    """
    count = image.width * image.height
    if count > config.max_pixels:
        words = f"has {count:,} pixels; the limit is {config.max_pixels:,}"
        raise InputError(words, "raise --max-pixels if you trust it", kind="too-large")
    if not count:
        raise InputError("has no pixels", kind="empty")
    try:
        with _one_at_a_time:  # it may not be loaded yet, and stand in the list twice
            copy = image.copy()
        rgb = finish(cast(ImageFile.ImageFile, copy), b"", reader.parse_colour(config.alpha))
    except HOSTILE as error:
        raise InputError(f"cannot be decoded: {error}", kind="damaged") from error
    # Only sampling asks for it, and hashing pixels is slow.
    digest = hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest() if config.sample else ""
    return Picture(rgb, digest)
