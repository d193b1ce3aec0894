"""The captioning engine against `model.generate` of transformers: same weights, one process, interleaved, medians."""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import full_size
import numpy as np
import torch
from full_size import END, TOKENS
from transformers import VisionEncoderDecoderModel

from dbcap.captioning.decoding import Decoding
from dbcap.captioning.engines.torch import TorchEngine
from dbcap.captioning.loading import load_weights
from dbcap.captioning.search import Special, search
from dbcap.models import cpu
from dbcap.models.packed import Linear

RUNS = 5
WORK = {
    (8, 4): "8 images x 4 beams",
    (8, 1): "8 images, greedy",
    (1, 4): "1 image x 4 beams",
    (1, 1): "1 image, greedy",
}
BARS = {  # (images, beams) -> against generate in float32, in bfloat16; with AMX, without
    "amx": {(8, 4): (5.0, 2.0), (8, 1): (3.5, 1.5), (1, 4): (3.5, 1.8), (1, 1): (2.5, 1.5)},
    "else": {(8, 4): (5.0, 2.0), (8, 1): (3.5, 1.5), (1, 4): (3.2, 1.4), (1, 1): (1.8, 1.0)},
}
FLOAT32_BAR = 2.0  # the float32 engine against float32 `generate`, 8 x 4

_ALONE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import engine
engine.once(**json.loads(sys.argv[2]))
print(engine.own_peak_mib())
"""


def measure() -> dict[str, Any]:
    """Measure everything about the engine."""
    with full_size.folder() as folder:
        times, encoder = _times(folder)
        peaks = _peaks(folder)
        profile = _profile(folder)
    bandwidth = _bandwidth()
    weights = _decoder_bytes()
    floor = {images: encoder[images] + TOKENS * weights / bandwidth * 1000 for images in (1, 8)}
    rows = _rows(times, peaks)
    return {
        "threads": torch.get_num_threads(),
        "bandwidth_gb_s": bandwidth / 1e9,
        "decoder_bytes_bfloat16": weights,
        "encoder_ms": encoder,
        "floor_ms": floor,
        "ms": {f"{WORK[work]}, {name}": value for (work, name), value in times.items()},
        "peak_mib": {f"{WORK[work]}, {name}": value for (work, name), value in peaks.items()},
        "profile": profile,
        "rows": rows,
        "text": _text(times, encoder, floor, bandwidth, profile),
    }


def generate(model: Any, images: int, beams: int) -> None:
    """Let transformers caption, as its users do, with the length forced."""
    pixels = torch.zeros(images, 3, 224, 224, dtype=model.dtype)
    with torch.inference_mode():
        model.generate(pixels, num_beams=beams, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS)


def caption(engine: TorchEngine, images: int, beams: int, end: int = END, side: int = 224) -> None:
    """Let the engine do the same."""
    decoding = Decoding(num_beams=beams, max_length=TOKENS + 1, min_length=TOKENS + 1)
    search(engine, np.zeros((images, 3, side, side), np.float32), decoding, Special(end, (end,), end), [0] * images)


def load(folder: Path, dtype: str) -> Any:
    """Load the transformers model."""
    return VisionEncoderDecoderModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def own_engine(folder: Path, dtype: str) -> TorchEngine:
    """Load dbcap's engine as `dbcap caption` does."""
    loaded = load_weights(VisionEncoderDecoderModel, folder, folder.name, getattr(torch, dtype))
    return TorchEngine(loaded.model, loaded.weights.release)


def once(folder: str, name: str, dtype: str, images: int, beams: int) -> None:
    """Load and caption once, in a process whose peak memory is measured."""
    if name == "generate":
        generate(load(Path(folder), dtype), images, beams)
    else:
        caption(own_engine(Path(folder), dtype), images, beams)


def own_peak_mib() -> float:
    """Return this process's peak resident memory; getrusage's counts that of the parent before exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _times(folder: Path) -> tuple[dict[tuple[tuple[int, int], str], float], dict[int, float]]:
    """Return milliseconds by work and name, and those of the engine's bfloat16 encoder by number of images."""
    models = {dtype: load(folder, dtype) for dtype in ("float32", "bfloat16")}
    engines = {dtype: TorchEngine(load(folder, dtype)) for dtype in models}
    times = {}
    for work in WORK:
        calls: dict[str, Callable[[], None]] = {}
        for dtype in models:
            calls[f"generate {dtype}"] = functools.partial(generate, models[dtype], *work)
            calls[f"engine {dtype}"] = functools.partial(caption, engines[dtype], *work)
        for name, seconds in _interleaved(calls).items():
            times[work, name] = seconds * 1000
    encode: dict[str, Callable[[], Any]] = {
        str(images): functools.partial(engines["bfloat16"].encode, np.zeros((images, 3, 224, 224), np.float32), 4, 16)
        for images in (1, 8)
    }
    return times, {int(name): seconds * 1000 for name, seconds in _interleaved(encode).items()}


def _interleaved(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Return the median seconds of each, run in turns, so that a slow moment of the machine hits all of them."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(RUNS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _peaks(folder: Path) -> dict[tuple[tuple[int, int], str], float]:
    """Return peak resident MiB of processes that load a model and caption once."""
    peaks = {}
    for work in WORK:
        for dtype in ("float32", "bfloat16"):
            for name in ("generate", "engine"):
                job = {"folder": str(folder), "name": name, "dtype": dtype, "images": work[0], "beams": work[1]}
                words = [sys.executable, "-c", _ALONE, str(Path(__file__).parent), json.dumps(job)]
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                peaks[work, f"{name} {dtype}"] = float(done.stdout.split()[-1])
    return peaks


def _bandwidth() -> float:
    """Return the bytes a second at which products with one row read weights that are in no cache."""
    size = 4096
    layers = [Linear(torch.zeros(size, size, dtype=torch.bfloat16), None) for _ in range(24)]
    row = torch.zeros(1, size, dtype=torch.bfloat16)
    found = []
    with torch.inference_mode():
        for _ in range(2 * RUNS + 1):
            start = time.perf_counter()
            for layer in layers:
                layer(row)
            found.append(len(layers) * 2 * size**2 / (time.perf_counter() - start))
    return statistics.median(found)


def _decoder_bytes() -> int:
    """Return the bytes of bfloat16 weights that a step of GPT-2 with cross-attention reads."""
    width, layers, vocabulary = 768, 12, 50257
    in_layer = (3 + 1 + 1 + 1 + 4 + 4) * width * width  # not the keys and values of cross-attention
    return 2 * (layers * in_layer + vocabulary * width)


def _profile(folder: Path) -> dict[str, float]:
    """Return the shares of one run of 8 images x 4 beams in bfloat16, in percent."""
    engine = TorchEngine(load(folder, "bfloat16"))
    encode = engine.encode

    def marked(*arguments: Any) -> Any:
        with torch.profiler.record_function("encode"):
            return encode(*arguments)

    engine.encode = marked  # type: ignore[method-assign]
    caption(engine, 8, 4)
    start = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        caption(engine, 8, 4)
    total = (time.perf_counter() - start) * 1e6
    groups = {
        "linear layers": ("linear_pointwise",),
        "choosing tokens": ("log_softmax", "topk", "gather"),
        "attention": ("bmm", "scaled_dot_product", "softmax"),
        "layer norm": ("layer_norm",),
    }
    other = "other kernels (copies, additions, cache)"
    shares = {f"{half}: {name}": 0.0 for half in ("encoder", "decoder") for name in (*groups, other)}
    for event in profile.events():
        if event.name == "encode":
            continue
        group = next((name for name, keys in groups.items() if any(key in event.name for key in keys)), other)
        shares[f"{'encoder' if _within_encode(event) else 'decoder'}: {group}"] += event.self_cpu_time_total
    shares = {name: value for name, value in shares.items() if value}
    shares["Python and the loop"] = total - sum(shares.values())
    return {name: 100 * value / total for name, value in shares.items()}


def _within_encode(event: Any) -> bool:
    while event.cpu_parent is not None:
        event = event.cpu_parent
    return bool(event.name == "encode")


def _rows(
    times: dict[tuple[tuple[int, int], str], float], peaks: dict[tuple[tuple[int, int], str], float]
) -> list[dict[str, Any]]:
    bars = BARS.get(cpu.cpu_class(), BARS["else"])
    rows = []
    for work, what in WORK.items():
        own = times[work, "engine bfloat16"]
        for dtype, bar in zip(("float32", "bfloat16"), bars[work], strict=True):
            ratio = times[work, f"generate {dtype}"] / own
            about = f"{what}: bfloat16 against generate in {dtype}"
            rows.append({"what": about, "value": f"{own:.0f} ms", "ratio": ratio, "at_least": bar})
    work = (8, 4)
    own = times[work, "engine float32"]
    about = f"{WORK[work]}: float32 against generate in float32"
    ratio = times[work, "generate float32"] / own
    rows.append({"what": about, "value": f"{own:.0f} ms", "ratio": ratio, "at_least": FLOAT32_BAR})
    for work, what in WORK.items():
        for dtype in ("float32", "bfloat16"):
            peak = peaks[work, f"engine {dtype}"]
            ratio = peak / peaks[work, f"generate {dtype}"]
            about = f"{what}: peak memory against generate in {dtype}"
            rows.append({"what": about, "value": f"{peak:.0f} MiB", "ratio": ratio, "at_most": 1.0})
    return rows


def _text(
    times: dict[tuple[tuple[int, int], str], float],
    encoder: dict[int, float],
    floor: dict[int, float],
    bandwidth: float,
    profile: dict[str, float],
) -> list[str]:
    """Return the tables as Markdown."""
    names = ["generate float32", "generate bfloat16", "engine float32", "engine bfloat16"]
    lines = [
        f"{torch.get_num_threads()} threads, {bandwidth / 1e9:.1f} GB/s read by all of them; {TOKENS} tokens, ms:",
        "",
        f"| work | {' | '.join(names)} | floor bfloat16 | engine over floor |",
        "|---" * (len(names) + 3) + "|",
    ]
    for work, what in WORK.items():
        own = [times[work, name] for name in names]
        lowest = floor[work[0]]
        figures = " | ".join(f"{value:.0f}" for value in own)
        lines.append(f"| {what} | {figures} | {lowest:.0f} | {own[-1] / lowest:.2f} |")
    lines += [
        "",
        "The engine's encoder in bfloat16, with the keys and values of cross-attention:"
        f" {encoder[1]:.0f} ms for 1 image, {encoder[8]:.0f} ms for 8.",
        "",
        "| 8 images x 4 beams in bfloat16 | share |",
        "|---|---|",
        *(f"| {name} | {share:.1f} % |" for name, share in profile.items()),
    ]
    return lines
