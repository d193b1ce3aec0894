"""Pictures that say how they were made: A1111's `parameters` and a JSON document of our own, in PNG, WebP and JPEG."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dbcap.generation.jobs import Job, UnfitError
from dbcap.pixels import HOSTILE

ENDINGS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
MOST_EXIF = 65533
"""Bytes of Exif data in a JPEG."""
_DESCRIPTION, _EXIF, _COMMENT, _SOFTWARE = 0x010E, 0x8769, 0x9286, 0x0131
_GRID = "dbcap grid"
_SAMPLERS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "euler": "Euler",
    "euler-a": "Euler a",
    "dpm++": "DPM++ 2M",
    "dpm++-karras": "DPM++ 2M Karras",
    "unipc": "UniPC",
    "lms": "LMS",
    "heun": "Heun",
}


def parameters(job: Job, model: str, sampler: str, version: str) -> str:
    """Return the text that A1111's web UI writes and many tools read."""
    lines = [job.prompt]
    if job.negative:
        lines.append(f"Negative prompt: {job.negative}")
    facts = {
        "Steps": job.steps,
        "Sampler": _SAMPLERS.get(sampler, sampler),
        "CFG scale": f"{job.guidance:g}",
        "Seed": job.seed,
        "Size": f"{job.width}x{job.height}",
        "Model hash": job.model[:10],
        "Model": _quoted(model),
    }
    if job.init:
        facts["Denoising strength"] = f"{job.strength:g}"
    facts["Version"] = f"dbcap {version}"
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items()))
    return "\n".join(lines).encode("utf-8", "replace").decode()  # a model's path need not be UTF-8


def _quoted(value: str) -> str:
    """Return a value as it can stand between the commas of the last line."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"\n\r') else value


def encoded(pixels: npt.NDArray[np.uint8], kind: str, text: str, facts: dict[str, Any]) -> bytes:
    """Return a picture file of RGB pixels (height, width, 3); `kind` is png, webp (lossless) or jpeg.

    Raises UnfitError where a JPEG has no room for the texts.
    """
    image = Image.fromarray(pixels)
    document = json.dumps(facts, ensure_ascii=True)
    buffer = io.BytesIO()
    if kind == "png":
        info = PngInfo()
        info.add_itxt("parameters", text) if not text.isascii() else info.add_text("parameters", text)
        info.add_text("dbcap", document)
        image.save(buffer, "PNG", pnginfo=info)
        return buffer.getvalue()
    exif = Image.Exif()
    exif[_DESCRIPTION] = document
    exif.get_ifd(_EXIF)[_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {"quality": 95, "subsampling": 0}
    packed = exif.tobytes()
    if kind == "jpeg" and len(packed) > MOST_EXIF:
        raise UnfitError("the prompt is too long to be kept in a JPEG", "use --image-format png or webp")
    image.save(buffer, kind.upper(), exif=packed, **options)
    return buffer.getvalue()


def facts_of(path: Path) -> dict[str, Any] | None:
    """Return the JSON document in a picture, or None where there is none that can be read. Decodes no pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=[kind.upper() for kind in ENDINGS]) as image:
                document = image.info.get("dbcap") or image.getexif().get(_DESCRIPTION)
        facts = json.loads(document) if isinstance(document, str) else None
    except HOSTILE:
        return None
    sound = isinstance(facts, dict) and isinstance(facts.get("job"), dict) and isinstance(facts.get("key"), str)
    return facts if sound else None


def whole(path: Path) -> bool:
    """Return whether a picture file ends as its format does: it was not cut short. Decodes no pixels."""
    if not os.path.isfile(path):  # opening a pipe would wait for its other end
        return False
    try:
        with path.open("rb") as file:
            start, size = file.read(12), file.seek(0, os.SEEK_END)
            file.seek(-min(12, size), os.SEEK_END)
            end = file.read()
    except OSError:
        return False
    if start.startswith(b"RIFF"):
        return int.from_bytes(start[4:8], "little") + 8 == size
    return end.endswith(b"IEND\xaeB`\x82" if start.startswith(b"\x89PNG") else b"\xff\xd9")


def write_grid(pictures: Sequence[Image.Image], columns: int | None, file: IO[bytes], kind: str) -> None:
    """Write pictures side by side as PNG, WEBP or JPEG, marked so that `is_grid` knows it again."""
    exif = Image.Exif()
    exif[_SOFTWARE] = _GRID
    grid(pictures, columns).save(file, kind, exif=exif.tobytes(), quality=95)


def is_grid(path: Path) -> bool:
    """Return whether `write_grid` wrote a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=[kind.upper() for kind in ENDINGS]) as image:
                return image.getexif().get(_SOFTWARE) == _GRID
    except HOSTILE:
        return False


def grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Return pictures side by side in rows, black where there is none; by default about as many rows as columns."""
    columns = columns or max(1, round(len(pictures) ** 0.5))
    width, height = (max(one.size[axis] for one in pictures) for axis in (0, 1))
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * width, rows * height))
    for number, one in enumerate(pictures):
        whole.paste(one, (number % columns * width, number // columns * height))
    return whole
