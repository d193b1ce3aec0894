"""Pictures that say how they were made: A1111's `parameters` and a JSON document of our own, in PNG, WebP and JPEG."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dbcap.generation.jobs import Job

ENDINGS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
_DESCRIPTION, _EXIF, _COMMENT = 0x010E, 0x8769, 0x9286
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
        "Model": model.replace(",", " "),
    }
    if job.init:
        facts["Denoising strength"] = f"{job.strength:g}"
    facts["Version"] = f"dbcap {version}"
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items()))
    return "\n".join(lines)


def encoded(pixels: npt.NDArray[np.uint8], kind: str, text: str, facts: dict[str, Any]) -> bytes:
    """Return a picture file of RGB pixels (height, width, 3); `kind` is png, webp (lossless) or jpeg."""
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
    image.save(buffer, kind.upper(), exif=exif.tobytes(), **options)
    return buffer.getvalue()


def facts_of(path: Path) -> dict[str, Any] | None:
    """Return the JSON document in a picture, or None where there is none that can be read. Decodes no pixels."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            document = image.info.get("dbcap") or image.getexif().get(_DESCRIPTION)
        facts = json.loads(document) if isinstance(document, str) else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return facts if isinstance(facts, dict) and "job" in facts and "key" in facts else None


def grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Return pictures side by side in rows, black where there is none; by default about as many rows as columns."""
    columns = columns or max(1, round(len(pictures) ** 0.5))
    width, height = (max(one.size[axis] for one in pictures) for axis in (0, 1))
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * width, rows * height))
    for number, one in enumerate(pictures):
        whole.paste(one, (number % columns * width, number // columns * height))
    return whole
