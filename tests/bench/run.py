"""`make bench`: measure, print tables, write bench-results/NAME.json. Arguments choose what is measured."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import agreement
import batch_sizes
import command_line
import diffusion
import dreambooth
import engine
import exported
import generated
import memory
import startup
import subjects

from dbcap.models import cpu

BENCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "startup": startup.measure,
    "memory": memory.measure,
    "engine": engine.measure,
    "exported": exported.measure,
    "batch-sizes": batch_sizes.measure,
    "command-line": command_line.measure,
    "diffusion": diffusion.measure,
    "generated": generated.measure,
    "subjects": subjects.measure,
    "training": dreambooth.measure,
    "agreement": agreement.measure,
}
RESULTS = Path(__file__).parents[2] / "bench-results"


def main() -> int:
    """Run the chosen benchmarks. Returns 1 when a bar is missed."""
    names = sys.argv[1:] or list(BENCHES)
    machine = {"cpu": cpu.cpu_name(), "class": cpu.cpu_class(), "cores": cpu.cores(), "date": time.strftime("%Y-%m-%d")}
    print(f"{machine['cpu']} ({machine['class']}), {machine['cores']} cores, {machine['date']}")
    RESULTS.mkdir(exist_ok=True)
    missed = False
    for name in names:
        result = BENCHES[name]()
        (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine, **result}, indent=2) + "\n")
        print(f"\n{name}")
        for line in result.get("text", ()):
            print(line)
        for row in result["rows"]:
            way, bar = next((way, row[way]) for way in ("at_most", "at_least") if way in row)
            within = row["ratio"] <= bar if way == "at_most" else row["ratio"] >= bar
            missed = missed or not within
            figures = f"{row['value']:>10}  ratio {row['ratio']:.2f}, {way.replace('_', ' ')} {bar:.2f}"
            print(f"  {row['what']:<68} {figures}{'' if within else '  MISSED'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
