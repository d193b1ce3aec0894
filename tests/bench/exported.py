"""An exported captioner against Optimum's int8 of the same weights, and what exporting and captioning with it take.

The full-size captioner, every caption forced to 16 tokens, the same pixels. dbcap's engine runs in this process,
Optimum's in its own environment; they take turns.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import full_size
import numpy as np
from engine import WORK
from full_size import TOKENS

import dbcap_starter
from dbcap.captioning.decoding import Decoding
from dbcap.captioning.exported import ExportedCaptioner
from dbcap.models import cpu
from dbcap.models.exported import files_of

sys.path.append(str(Path(__file__).parents[1] / "interop"))
import environments

RUNS = 5
REST = 0.3
"""Seconds between two turns, in which the threads of the one before stop spinning."""
OWN = ("int8", "q4", "fp32")
BARS = {(8, 4): 6.0, (1, 1): 3.0}
"""How many times as fast as Optimum's int8; without AMX these are aims."""
MOST_SECONDS = 60.0
MOST_BYTES = {"int8": 0.27, "q4": 0.20}
"""Of the float32 weights."""
GB = 1e9
OPTIMUM = Path(__file__).parent / "optimum_int8.py"
Work = tuple[int, int]

# What getrusage tells of a child counts the memory of its parent before exec: so the parent is a small process.
_MEASURED = """
import json, os, sys, time
start = time.perf_counter()
error = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
silent = [(os.POSIX_SPAWN_DUP2, error, 1), (os.POSIX_SPAWN_DUP2, error, 2)]
child = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[2:]], os.environ, file_actions=silent)
_, status, usage = os.wait4(child, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - start, usage.ru_maxrss * 1024]))
"""


def measure() -> dict[str, Any]:
    """Measure everything about exported captioners."""
    optimum = environments.optimum()
    with full_size.folder() as model:
        place = model.parent
        _execute(optimum, OPTIMUM, "export", model, place / "optimum")
        words = ("export", str(model), "--onnx", "--int8", "--int4", "--no-check", "--out", str(place / "own"))
        seconds, peak, _ = _command(place, *words)
        files = place / "own" / "onnx"
        sizes = {name: sum(path.stat().st_size for path in _files(files, name)) for name in OWN}
        sizes["optimum"] = sum(path.stat().st_size for path in (place / "optimum").glob("*.onnx"))
        weights = (model / "model.safetensors").stat().st_size
        times = _times(place, optimum)
        picture = min(dbcap_starter.samples().glob("*.png"))
        _, caption, modules = _command(place, "caption", str(picture), "--model", str(place / "own"))
        largest = max(path.stat().st_size for path in files.iterdir())
    bound = GB + 3 * largest
    torch = "torch" in modules
    rows = [
        *_speed_rows(times),
        *_size_rows(sizes, weights),
        _row("exporting to float32, int8 and int4", f"{seconds:.0f} s", seconds / MOST_SECONDS, at_most=1.0),
        _row("its peak memory against 1 GB + 3 x the largest file", f"{peak / GB:.2f} GB", peak / bound, at_most=1.0),
        _row("peak memory of captioning with int8 against 1 GB", f"{caption / GB:.2f} GB", caption / GB, at_most=1.0),
        _row("torch imported by it", "yes" if torch else "no", float(torch), at_most=0.0),
    ]
    return {
        "ms": {f"{WORK[work]}, {name}": value * 1000 for (work, name), value in times.items()},
        "bytes": sizes,
        "export_s": seconds,
        "export_peak_bytes": peak,
        "caption_peak_bytes": caption,
        "rows": rows,
        "text": _text(times, sizes),
    }


def _row(what: str, value: str, ratio: float, **bar: float) -> dict[str, Any]:
    return {"what": what, "value": value, "ratio": ratio, **bar}


def _speed_rows(times: dict[tuple[Work, str], float]) -> list[dict[str, Any]]:
    rows = []
    for work, bar in BARS.items():
        own = times[work, "int8"]
        about = f"{WORK[work]}: int8 against Optimum's"
        rows.append(_row(about, f"{own * 1000:.0f} ms", times[work, "optimum"] / own, at_least=bar))
    return rows


def _size_rows(sizes: dict[str, int], weights: int) -> list[dict[str, Any]]:
    rows = []
    for name, most in MOST_BYTES.items():
        about = f"{name} files against {weights / 1e6:.0f} MB of float32 weights"
        rows.append(_row(about, f"{sizes[name] / 1e6:.0f} MB", sizes[name] / weights, at_most=most))
    return rows


def _files(folder: Path, variant: str) -> list[Path]:
    return [folder / name for name in files_of(variant)]


def _execute(*words: Any) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} failed: {done.stderr[-2000:]}")


def _command(place: Path, *words: str) -> tuple[float, float, set[str]]:
    """Run dbcap; returns its seconds, its peak resident bytes and the modules that it imported."""
    log = place / "log"
    python = ("-X", "importtime", "-m", "dbcap", *words)
    done = subprocess.run([sys.executable, "-c", _MEASURED, str(log), *python], capture_output=True, text=True)
    code, seconds, peak = json.loads(done.stdout)
    said = log.read_text().splitlines()
    imports = "import time:"
    if code:
        own = [line for line in said if not line.startswith(imports)]
        raise SystemExit(f"dbcap {' '.join(words)} ended with {code}: {' '.join(own[-5:])}")
    return seconds, peak, {line.rsplit("|")[-1].strip() for line in said if line.startswith(imports)}


def _times(place: Path, optimum: Path) -> dict[tuple[Work, str], float]:
    """Return the median seconds by work and name, all run in turns."""
    threads = cpu.cores()
    pixels = np.random.default_rng(0).standard_normal((8, 3, 224, 224)).astype(np.float32)
    np.save(place / "pixels.npy", pixels)
    folder = place / "own"
    own = {name: ExportedCaptioner(folder, name, *_files(folder / "onnx", name), threads) for name in OWN}
    found: dict[tuple[Work, str], list[float]] = {}
    with _other(optimum, place / "optimum", place / "pixels.npy", threads) as other:
        calls: dict[str, Callable[[Work], float]] = {"optimum": other}
        calls |= {name: functools.partial(_caption, captioner, pixels) for name, captioner in own.items()}
        for run in range(1 + RUNS):
            for work in WORK:
                for name, call in calls.items():
                    time.sleep(REST)
                    seconds = call(work)
                    if run:  # the first one warms up
                        found.setdefault((work, name), []).append(seconds)
    return {key: statistics.median(seconds) for key, seconds in found.items()}


def _caption(captioner: ExportedCaptioner, pixels: np.ndarray[Any, Any], work: Work) -> float:
    images, beams = work
    decoding = Decoding(num_beams=beams, max_length=TOKENS + 1, min_length=TOKENS + 1)
    start = time.perf_counter()
    captioner.search(pixels[:images], decoding, [0] * images)
    return time.perf_counter() - start


@contextlib.contextmanager
def _other(python: Path, folder: Path, pixels: Path, threads: int) -> Iterator[Callable[[Work], float]]:
    """Give a function that lets Optimum caption and returns the seconds that it took."""
    words = [str(word) for word in (python, OPTIMUM, "time", folder, pixels, threads, TOKENS)]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin
    assert process.stdout
    requests, answers = process.stdin, process.stdout

    def caption(work: Work) -> float:
        print(*work, file=requests, flush=True)
        return float(answers.readline())

    try:
        if answers.readline().strip() != "ready":
            raise SystemExit(f"Optimum does not load {folder}")
        yield caption
    finally:
        requests.close()
        process.wait()


def _text(times: dict[tuple[Work, str], float], sizes: dict[str, int]) -> list[str]:
    """Return the tables as Markdown."""
    names = ("optimum", *OWN)
    lines = [
        f"{cpu.cores()} threads; {TOKENS} tokens, ms:",
        "",
        "| | Optimum int8 | int8 | q4 | fp32 | int8: times Optimum's |",
        "|---|---|---|---|---|---|",
    ]
    for work, what in WORK.items():
        figures = " | ".join(f"{times[work, name] * 1000:.0f}" for name in names)
        lines.append(f"| {what} | {figures} | {times[work, 'optimum'] / times[work, 'int8']:.1f} |")
    lines.append(f"| MB of files | {' | '.join(f'{sizes[name] / 1e6:.0f}' for name in names)} | |")
    return lines
