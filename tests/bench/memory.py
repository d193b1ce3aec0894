"""Peak memory of captioning 10,000 images against 100: it must not grow with the number."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import dbcap_starter

FEW, MANY = 100, 10_000


def peak_mib(images: int, folder: Path) -> float:
    """Return the peak resident memory of one `dbcap caption` over hard links of the sample images, in MiB."""
    samples = sorted(dbcap_starter.samples().glob("*.png"))
    source = folder / "source"
    source.mkdir()
    for number, sample in enumerate(samples):
        (source / f"{number}.png").write_bytes(sample.read_bytes())
    many = folder / "many"
    many.mkdir()
    for number in range(images):
        os.link(source / f"{number % len(samples)}.png", many / f"{number:06}.png")
    words = [sys.executable, "-m", "dbcap", "caption", str(many), "--profile", "starter", "--num-beams", "1"]
    process = subprocess.Popen(
        [*words, "--format", "jsonl", "-o", str(folder / "out.jsonl")], stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    lines = (folder / "out.jsonl").read_text().count("\n")
    if process.returncode or lines != images:
        raise SystemExit(f"captioning {images} images ended with {process.returncode} and {lines} lines")
    return usage.ru_maxrss / 1024


def measure() -> dict[str, Any]:
    """Measure both."""
    peaks = {}
    for images in (FEW, MANY):
        with tempfile.TemporaryDirectory() as folder:
            peaks[images] = peak_mib(images, Path(folder))
    row = {
        "what": f"peak memory of {MANY:,} images against {FEW}",
        "value": f"{peaks[MANY]:.0f} MiB",
        "ratio": peaks[MANY] / peaks[FEW],
        "at_most": 1.1,
    }
    return {"peak_mib": {str(k): v for k, v in peaks.items()}, "rows": [row]}
