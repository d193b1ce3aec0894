"""How long the command line takes to start, against importing typer alone."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

RUNS = 21


def _seconds(words: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure() -> dict[str, Any]:
    """Interleave the three commands, so that a slow moment of the machine hits all of them; medians."""
    commands = {
        "python -c 'import typer'": [sys.executable, "-c", "import typer"],
        "dbcap --version": [sys.executable, "-m", "dbcap", "--version"],
        "dbcap --help": [sys.executable, "-m", "dbcap", "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(RUNS):
        for name, words in commands.items():
            times[name].append(_seconds(words))
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    base = median["python -c 'import typer'"]
    bars = {"dbcap --version": 1.5, "dbcap --help": 3.0}
    rows = [
        {"what": name, "value": f"{median[name] * 1000:.0f} ms", "ratio": median[name] / base, "at_most": bar}
        for name, bar in bars.items()
    ]
    return {"base_ms": base * 1000, "rows": rows}
