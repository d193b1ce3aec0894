"""The table behind `--batch-size auto`: where the engine's throughput stops to grow, for this CPU class.

Models of several sizes, float32 and bfloat16, batches of 1, 2, 4 ... images: milliseconds an image, captioned greedily,
and how far 4 beams raise the peak of memory. A size is chosen that is within BUDGET_MIB, and of these the smallest that
reaches ENOUGH of the best throughput. Writes src/dbcap/models/batch_sizes.json; other CPU classes in it stay.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import engine
import full_size

from dbcap.captioning.captioner import count_parameters
from dbcap.models import cpu
from dbcap.models.device import BATCH_SIZES

BUDGET_MIB = 1024
ENOUGH = 0.95
MOST = 64
RUNS = 5
DTYPES = ("float32", "bfloat16")

_SMALL = {"image_size": 64, "patch_size": 8}


def _sizes(width: int, layers: int, heads: int, *, vocabulary: int, text_layers: int, **more: int) -> tuple[Any, Any]:
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    text = {"n_embd": width, "n_layer": text_layers, "n_head": heads, "vocab_size": vocabulary}
    return {**vision, "num_attention_heads": heads, **more}, text


MODELS = (
    _sizes(128, 4, 4, vocabulary=2000, text_layers=3, **_SMALL),
    _sizes(256, 6, 4, vocabulary=2000, text_layers=3, **_SMALL),  # as the starter captioner
    _sizes(384, 6, 6, vocabulary=10000, text_layers=4),
    _sizes(512, 12, 8, vocabulary=50257, text_layers=6),
    ({}, {}),
)

_ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
import batch_sizes
batch_sizes.alone(*sys.argv[2:])
"""


def measure() -> dict[str, Any]:
    """Measure all, and write the table."""
    found = []
    for vision, text in MODELS:
        with full_size.folder(vision, text) as folder:
            parameters = count_parameters(folder)
            image = vision.get("image_size", 224)
            for dtype in DTYPES:
                words = [sys.executable, "-c", _ALONE, str(Path(__file__).parent), str(folder), dtype]
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                batches = json.loads(done.stdout.splitlines()[-1])
                size = knee(batches)
                found.append({"parameters": parameters, "image": image, "dtype": dtype, "size": size, "of": batches})
    _write(found)
    return {"models": found, "rows": [], "text": _text(found)}


def knee(batches: list[dict[str, float]]) -> int:
    """Return the chosen batch size of those measured."""
    possible = [one for one in batches if one["mib"] <= BUDGET_MIB] or batches[:1]
    best = min(one["ms"] for one in possible)
    return int(next(one["size"] for one in possible if best >= ENOUGH * one["ms"]))


def alone(folder: str, dtype: str) -> None:
    """Measure one model in a process of its own, and print what was found as JSON."""
    runner = engine.own_engine(Path(folder), dtype)
    config = json.loads((Path(folder) / "config.json").read_text())
    end, side = config["eos_token_id"], config["encoder"]["image_size"]
    engine.caption(runner, 1, 1, end, side)
    before = engine.own_peak_mib()
    batches: list[dict[str, float]] = []
    size = 1
    while size <= MOST:
        times = []
        for run in range(RUNS + 1):
            start = time.perf_counter()
            engine.caption(runner, size, 1, end, side)
            if run:
                times.append(time.perf_counter() - start)
        engine.caption(runner, size, 4, end, side)
        grown = engine.own_peak_mib() - before
        batches.append({"size": size, "ms": statistics.median(times) * 1000 / size, "mib": grown})
        if grown > BUDGET_MIB:
            break
        size *= 2
    print(json.dumps(batches))


def _write(found: list[dict[str, Any]]) -> None:
    whole = json.loads(BATCH_SIZES.read_text())
    table: dict[str, Any] = {"measured": f"{cpu.cpu_name()}, {cpu.cores()} cores, {time.strftime('%Y-%m-%d')}"}
    for dtype in DTYPES:
        rows = sorted((one["parameters"], one["size"]) for one in found if one["dtype"] == dtype)
        table[dtype] = [list(row) for row in rows]
    whole[cpu.cpu_class()] = table
    BATCH_SIZES.write_text(json.dumps(whole, indent=2) + "\n")


def _text(found: list[dict[str, Any]]) -> list[str]:
    sizes = [2**power for power in range(int(math.log2(MOST)) + 1)]
    lines = [
        "ms an image, greedily, by images in a batch; chosen: the smallest batch with 95 % of the best throughput that",
        f"takes no more than {BUDGET_MIB} MiB with 4 beams (- was not measured: too large).",
        "",
        f"| parameters (image) | | {' | '.join(map(str, sizes))} | MiB | chosen |",
        "|---" * (len(sizes) + 4) + "|",
    ]
    for one in found:
        of = {batch["size"]: batch for batch in one["of"]}
        cells = " | ".join(f"{of[size]['ms']:.3g}" if size in of else "-" for size in sizes)
        name = f"{one['parameters'] / 1e6:.3g} M ({one['image']})"
        lines.append(f"| {name} | {one['dtype']} | {cells} | {of[one['size']]['mib']:.0f} | {one['size']} |")
    return lines
