"""What the `image-to-text` pipeline takes as an image, and the errors of images: of the classes that v4 raised."""

from __future__ import annotations

import base64
import os
from typing import Any

from PIL import Image, UnidentifiedImageError

from dbcap import images, web
from dbcap.captioning.feed import from_pillow
from dbcap.captioning.reading import Prepared
from dbcap.config.models import CaptionConfig
from dbcap.errors import InputError
from dbcap.images import Picture

_LIMITS = CaptionConfig(inputs=())


class ImageSourceError(InputError, ValueError):
    """A text is neither a URL, nor a path, nor a picture in base64."""


class ImageTypeError(InputError, TypeError):
    """Something of another type than the pipeline takes."""


class BadImageError(InputError, UnidentifiedImageError):
    """An image cannot be fetched or decoded."""


def picture_of(image: Any, timeout: float | None) -> Picture:
    """Read what the pipeline takes as an image. Raises InputError, of v4's class where the source itself is wrong."""
    if isinstance(image, Image.Image):
        return from_pillow(image, _LIMITS)
    if not isinstance(image, str):
        raise ImageTypeError(
            "Incorrect format used for image. Should be an url linking to an image, a base64 string, a local path, or"
            f" a PIL image. Got {type(image)}.",
            kind="unsupported",
        )
    if image.startswith(("http://", "https://")):
        most = _LIMITS.url_max_mb * 1_000_000
        return images.read_bytes(web.fetch(image, timeout=timeout or _LIMITS.url_timeout, max_bytes=most))
    if os.path.isfile(image):
        return images.read(image)
    text = image.partition(",")[2] if image.startswith("data:image/") else image
    try:
        return images.read_bytes(base64.decodebytes(text.encode()))
    except (InputError, ValueError) as error:  # binascii.Error is a ValueError
        reason = error.message if isinstance(error, InputError) else str(error)
        raise ImageSourceError(
            "Incorrect image source. Must be a valid URL starting with `http://` or `https://`, a valid path to an"
            f" image file, or a base64 encoded string. Got {_short(image)}. Failed with {reason}",
            kind="missing",
        ) from error


def named(item: Prepared) -> InputError:
    """Return the error of an image, with its name, and of v4's class."""
    error = item.error
    assert error
    if isinstance(error, ImageSourceError | ImageTypeError):
        return error
    hint = "make it smaller first" if error.kind == "too-large" else error.hint
    return BadImageError(f"{_short(item.source.name)}: {error.message}", hint, kind=error.kind)


def _short(text: str) -> str:
    """Shorten what may be a whole picture in base64."""
    return text if len(text) <= 200 else f"{text[:200]}..."
