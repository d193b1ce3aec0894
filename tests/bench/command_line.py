"""`dbcap caption` over files against its engine alone: what finding, reading, writing and starting up cost.

The full-size captioner, every choice left to `auto`, greedy captions of 16 tokens. The engine's own time is that of as
many batches of the same shape with pixels that are there already, in a process with nothing else to do.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import engine
import full_size
import numpy as np
from full_size import TOKENS
from PIL import Image

import dbcap_starter
from dbcap.captioning import reading
from dbcap.captioning.captioner import TransformersCaptioner, count_parameters
from dbcap.config.models import CaptionConfig
from dbcap.inputs import Source
from dbcap.models import device

SHARED = Path(os.environ.get("DBCAP_SHARED") or Path(__file__).parents[3] / "shared")
WORK = {(640, 480): 2000, (2048, 1536): 200}
"""Size of the JPEG files -> how many."""
AT_MOST = 1.15
DISTINCT = 50


def measure() -> dict[str, Any]:
    """Measure both sizes of images."""
    found = {}
    with full_size.folder() as model, tempfile.TemporaryDirectory(prefix="dbcap-bench-") as place:
        choice = device.choose(parameters=count_parameters(model))
        runner = engine.own_engine(model, choice.dtype)
        for size, count in WORK.items():
            folder = _photos(Path(place), size, count)
            wall = _command(model, folder, count)
            own = _own(runner, choice.batch_size, count)
            found[size] = {"images": count, "wall_s": wall, "engine_s": own, "reading_ms": _reading(model, folder)}
    rows = [
        {
            "what": f"{one['images']:,} JPEG files of {size[0]}x{size[1]}: wall time against the engine's own",
            "value": f"{one['wall_s']:.0f} s",
            "ratio": one["wall_s"] / one["engine_s"],
            "at_most": AT_MOST,
        }
        for size, one in found.items()
        if size == (640, 480)
    ]
    lines = [
        f"batches of {choice.batch_size} in {choice.dtype}, {choice.threads} threads",
        "",
        "| JPEG files | wall | engine alone | ratio | reading, on one core | its share of all work |",
        "|---|---|---|---|---|---|",
    ]
    for (width, height), one in found.items():
        work = one["engine_s"] * 1000 / one["images"] * choice.threads
        share = 100 * one["reading_ms"] / (one["reading_ms"] + work)
        lines.append(
            f"| {one['images']:,} of {width}x{height} | {one['wall_s']:.1f} s | {one['engine_s']:.1f} s"
            f" | {one['wall_s'] / one['engine_s']:.2f} | {one['reading_ms']:.1f} ms each | {share:.0f} % |"
        )
    return {
        "found": {f"{width}x{height}": one for (width, height), one in found.items()},
        "rows": rows,
        "text": lines,
    }


def _photos(place: Path, size: tuple[int, int], count: int) -> Path:
    """Write JPEG files of that size: crops of real photos where they are at hand, and links to them."""
    folder = place / f"{size[0]}"
    folder.mkdir()
    sources = sorted((SHARED / "photos").glob("*/*.jpg")) or sorted(dbcap_starter.samples().glob("*.png"))
    pictures = [Image.open(path).convert("RGB") for path in sources]
    random = np.random.default_rng(0)
    for number in range(DISTINCT):
        picture = pictures[number % len(pictures)]
        width = int(random.integers(picture.width // 2, picture.width + 1))
        height = min(picture.height, width * size[1] // size[0])
        box = (picture.width - width, picture.height - height, picture.width, picture.height)
        picture.resize(size, Image.Resampling.LANCZOS, box=box).save(folder / f"{number:05}.jpg", quality=90)
    for number in range(DISTINCT, count):
        os.link(folder / f"{number % DISTINCT:05}.jpg", folder / f"{number:05}.jpg")
    return folder


def _command(model: Path, folder: Path, count: int) -> float:
    """Return the seconds that the command takes."""
    output = folder.parent / f"{folder.name}.jsonl"
    words = [sys.executable, "-m", "dbcap", "caption", str(folder), "--model", str(model), "-o", str(output)]
    words += ["--format", "jsonl", "--num-beams", "1"]
    words += ["--max-length", str(TOKENS + 1), "--min-length", str(TOKENS + 1)]
    start = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    if (lines := output.read_text().count("\n")) != count:
        raise SystemExit(f"{lines} captions of {count} images")
    return seconds


def _own(runner: Any, batch: int, count: int) -> float:
    """Return the seconds of the engine for as many images, in batches of the same shape."""
    engine.caption(runner, batch, 1)
    start = time.perf_counter()
    for _ in range(-(-count // batch)):
        engine.caption(runner, batch, 1)
    return time.perf_counter() - start


def _reading(model: Path, folder: Path) -> float:
    """Return the milliseconds in which one thread reads and prepares a file: the median over all different ones."""
    from transformers import AutoImageProcessor

    class Preparing(TransformersCaptioner):
        """A captioner without a model."""

        def __init__(self) -> None:
            self.image_processor = AutoImageProcessor.from_pretrained(model, backend="pil")

    config, captioner = CaptionConfig(inputs=()), Preparing()
    times = []
    for number in range(DISTINCT):
        start = time.perf_counter()
        item = reading.prepare(Source(str(folder / f"{number:05}.jpg")), config, captioner.prepare)
        times.append(time.perf_counter() - start)
        if item.error:
            raise SystemExit(str(item.error))
    return statistics.median(times) * 1000
