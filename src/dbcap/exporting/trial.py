"""A captioner tried in a process of its own, so that its memory is measured alone: `python -m dbcap.exporting.trial`.

It reads a `Task` as one line of JSON from stdin and writes a `Trial` as JSON to stdout. It ends where stdin does, for
then the process that wants to know has ended.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dbcap import images
from dbcap.captioning import decoding, loader
from dbcap.captioning.decoding import Decoding
from dbcap.config.models import CaptionConfig
from dbcap.config.paths import cache_dir
from dbcap.events import Silent
from dbcap.models import hub

TIMED = 8
"""Images that are captioned one by one to measure latency, after one to warm up."""


@dataclass(frozen=True)
class Task:
    """What is to be tried."""

    model: str
    engine: str
    images: tuple[str, ...]
    references: tuple[tuple[int, ...], ...] = ()
    """Greedy captions of float32, as tokens with the start token: to compare what comes next, word by word."""
    allow_pickle: bool = True


@dataclass(frozen=True)
class Trial:
    """What came of it."""

    captions: tuple[str, ...]
    """As `dbcap caption` would say them by itself."""
    greedy: tuple[tuple[int, ...], ...]
    """Tokens of greedy captions."""
    next_tokens: tuple[int, int]
    """How many of all next tokens of the references are the likeliest here too, and how many there are."""
    latency: float
    """Seconds an image, greedily, alone: the median."""
    memory: int
    """The most bytes that the process had resident."""


def run(task: Task) -> Trial:
    """Try a captioner."""
    local = hub.locate(
        task.model,
        kind=loader.kind_for(task.engine),
        offline=True,
        allow_pickle=task.allow_pickle,
        events=Silent(),
        home=cache_dir(),
    )
    number = "auto" if local.onnx else "float32"
    captioner: Any = loader.load(local, Silent(), engine=task.engine, device="cpu", dtype=number).captioner
    can = captioner.capabilities
    usual = decoding.settle(CaptionConfig(inputs=()), captioner.defaults(), can, task.model)
    greedy = Decoding(max_length=usual.max_length)
    captions, tokens, right, places, times = [], [], 0, 0, []
    for place, path in enumerate(task.images):
        pixels = captioner.prepare(images.read(path).image)[None]
        start = time.perf_counter()
        tokens.append(captioner.search(pixels, greedy, [0])[0][0].tokens)
        times.append(time.perf_counter() - start)
        captions.append(captioner.generate(pixels, replace(usual, num_captions=1).as_dict(), [0])[0][0].text)
        if task.references:
            same = _next_tokens(captioner.engine, pixels, task.references[place])
            right, places = right + sum(same), places + len(same)
    latency = statistics.median(times[1 : 1 + TIMED] or times)
    return Trial(tuple(captions), tuple(tokens), (right, places), latency, _peak())


def _next_tokens(engine: Any, pixels: Any, reference: Sequence[int]) -> list[bool]:
    """Return for each token of a caption but the first whether it is the likeliest after those before it."""
    rows = 4  # as the search has them at least
    cache = engine.encode(pixels, rows, len(reference) - 1)
    none = np.empty((rows, 0), np.int64)
    return [
        int(engine.step(np.full(rows, token), cache, 1, none).tokens[0, 0]) == following
        for token, following in itertools.pairwise(reference)
    ]


def _peak() -> int:
    """Return the most bytes that this process had resident; `getrusage` would count its parent's before it began."""
    status = Path("/proc/self/status")
    if not status.is_file():
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else 1024 * used
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def _end_with_parent() -> None:
    os.read(0, 1)  # not by sys.stdin, whose lock Python wants when it ends
    os._exit(1)


if __name__ == "__main__":
    task = Task(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    json.dump(asdict(run(task)), sys.stdout)
