"""What `dbcap runs` tells of runs: the list, all about one, and its picture. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dbcap import plotting, runs
from dbcap.errors import DbcapError, UsageError
from dbcap.files import folder_size
from dbcap.plotting import BLUE, GREEN, ORANGE, Chart, Curve, Plot
from dbcap.runs import Run

DAMAGED = "damaged"
_LOST = "nobody trains it"
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class RunReport:
    """A line of `dbcap runs list`; where the manifest says nothing, the text is empty and the number 0."""

    name: str
    status: str
    note: str
    """What is odd about the status: a run that was killed, or a manifest that cannot be read."""
    step: int
    steps: int
    method: str
    model: str
    changed: str
    """ISO time."""
    size: int
    """Bytes on disk."""
    folder: Path


def overview() -> list[RunReport]:
    """Return all runs, the one that was changed last first. One that is damaged is called so."""
    return [_line(run) for run in runs.every()]


def _line(run: Run) -> RunReport:
    try:
        said = run.read()
        status = run.state(said)
    except DbcapError as error:
        said, status, note = {"step": 0}, DAMAGED, error.message
    else:
        note = _LOST if status != said["status"] else ""
    _, size = folder_size(run.folder)
    return RunReport(
        name=run.name,
        status=status,
        note=note,
        step=said["step"],
        steps=said.get("steps") or 0,
        method=said.get("method") or "",
        model=_model(said),
        changed=said.get("changed") or "",
        size=size,
        folder=run.folder,
    )


def _model(said: Mapping[str, Any]) -> str:
    """Return what a run is trained on; before it has looked for that, what it was asked for."""
    return str((said.get("base") or said.get("config") or {}).get("model") or "")


def details(run: Run) -> dict[str, Any]:
    """Return the manifest and all that the folder shows. Raises DbcapError where the manifest is damaged."""
    said = run.read()
    status, measured, best = run.state(said), metrics(run), run.best()
    there = run.steps()
    return said | {
        "name": run.name,
        "status": status,
        "note": _LOST if status != said["status"] else "",
        "folder": str(run.folder),
        "bytes": folder_size(run.folder)[1],
        "final": str(run.final) if run.final.is_dir() else None,
        "checkpoints": [
            {"step": step, "bytes": folder_size(path)[1], "best": step == best, "folder": str(path)}
            for step, path in there.items()
        ],
        "samples": sorted({step for line in pictures(run).values() for step in line}),
        "last": {name: points[-1][1] for name, points in measured.items() if points},
        "next": _next(run.name, status, bool(there)),
    }


def _next(name: str, status: str, there: bool) -> str:
    """Return the command that is likely to come next."""
    if status == runs.FINISHED:
        return f'dbcap generate "a photo of [V] {{class}}" --model run:{name}'
    if status == runs.RUNNING:
        return (
            f'dbcap generate "a photo of [V] {{class}}" --model run:{name}@last' if there else f"dbcap runs plot {name}"
        )
    return f"dbcap resume {name}"


def when(time: str) -> str:
    """Show an ISO time by the clock here, to the minute; what is none as it is."""
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M")
    return time


def metrics(run: Run) -> dict[str, Points]:
    """Return the measured values of each column by step, in order; of `metrics.csv` what can be read."""
    found: dict[str, dict[int, float]] = {}
    text = run.metrics.read_text("utf-8", "replace") if run.metrics.is_file() else ""
    whole = text[: text.rfind("\n") + 1]  # the last line is being written, perhaps
    for row in csv.DictReader(io.StringIO(whole), quoting=csv.QUOTE_NONE):
        step = row.pop("step", "") or ""
        for name, value in row.items() if step.isdecimal() else ():
            number = _number(value)
            if name and number is not None:
                found.setdefault(name, {})[int(step)] = number
    return {name: sorted(values.items()) for name, values in found.items()}


def _number(text: Any) -> float | None:
    try:
        number = float(text)
    except (ValueError, TypeError):
        return None
    return number if math.isfinite(number) else None


def pictures(run: Run) -> dict[str, dict[int, Path]]:
    """Return the sample pictures: name without its ending -> step -> file; those of the subject come first."""
    found: dict[str, dict[int, Path]] = {}
    for path in run.samples.glob("*/*.png"):
        if path.parent.name.isdecimal():
            found.setdefault(path.stem, {})[int(path.parent.name)] = path
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith("instance"), _natural(item[0]))))


def _natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts `class-10` behind `class-9`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


# ---- the picture of a run


def plot(run: Run, output: str | None) -> Path:
    """Draw a run into a PNG and return its path, by default NAME.png in the current folder.

    Raises UsageError for a place where something else is, DbcapError where there is nothing to draw yet.
    """
    path = Path(os.path.expanduser(output)) if output else Path(f"{run.name}.png")
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path} must end in .png", f"name it {run.name}.png, for example")
    if os.path.lexists(path) and not plotting.is_plot(path):
        raise UsageError(f"{path} is there, and is no plot of dbcap's", "choose another name, with -o FILE")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}", "make it, or choose another")
    plotting.write(_plot(run), path)
    return path


def _plot(run: Run) -> Plot:
    said, measured = run.read(), metrics(run)
    losses = [
        Curve("instance", BLUE, measured.get("instance", [])),
        Curve("class", ORANGE, measured.get("prior", [])),
    ]
    checks = [
        Curve("instance", BLUE, measured.get("validation_instance", []), every=True),
        Curve("class", ORANGE, measured.get("validation_prior", []), every=True),
        Curve("total", GREEN, measured.get("validation", []), every=True),
    ]
    if not measured.get("validation_prior"):  # then the total is that of the subject
        del checks[1:]
    if not any(curve.points for curve in (*losses, *checks)):
        raise DbcapError(f"the run {run.name} has measured nothing yet", f"`dbcap runs show {run.name}` says more")
    best = said.get("best")
    mark = (best["step"], best["value"]) if best else None
    config = said.get("config") or {}
    facts = [
        run.state(said),
        f"{said['step']} of {said.get('steps', '?')} steps",
        f"{said.get('method')} on {Path(_model(said)).name}",
        *([f"lr {config['lr']:g}"] if config.get("lr") else []),
        *([f"{said['identifier']} = {said.get('class') or 'the subject'}"] if said.get("identifier") else []),
    ]
    charts = [
        Chart("loss in training", losses),
        Chart("loss on held-out crops, with the same noise each time", checks, mark),
    ]
    return Plot(run.name, ",  ".join(facts), charts, pictures(run))
