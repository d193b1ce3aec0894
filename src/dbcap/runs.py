"""The run directory `runs/NAME/`: its manifest `run.json`, its states and checkpoints, and which runs there are."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbcap.config.paths import data_dir
from dbcap.errors import DbcapError, LockHeldError, UsageError, did_you_mean
from dbcap.files import Lock, folder_size, is_locked, write_atomic

MANIFEST = "run.json"
STATE = "state.json"
"""What a folder has that is a whole checkpoint."""
LOCK = ".lock"
RUNNING, INTERRUPTED, OUT_OF_TIME, FAILED, FINISHED = "running", "interrupted", "out of time", "failed", "finished"
UNFINISHED = (RUNNING, INTERRUPTED, OUT_OF_TIME, FAILED)
LAST, BEST = "last", "best"
"""What stands for a step: that of the newest checkpoint, and that of the best."""
_REMOVED = ".removed-"


@dataclass(frozen=True)
class Run:
    """A run by its folder."""

    folder: Path

    @property
    def name(self) -> str:
        """What it is called."""
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are: `000200/` for step 200, and the link `best`."""
        return self.folder / "checkpoints"

    @property
    def final(self) -> Path:
        """The finished model, once there is one: a pipeline, or a folder with a LoRA or embedding file."""
        return self.folder / "final"

    @property
    def metrics(self) -> Path:
        """Losses and the like, a line for each step."""
        return self.folder / "metrics.csv"

    @property
    def samples(self) -> Path:
        """Pictures made on the way: `000200/*.png`."""
        return self.folder / "samples"

    def lock(self) -> Lock:
        """Return its lock, which whoever trains it holds."""
        return Lock(self.folder / LOCK, hint="wait for it to end")

    def read(self) -> dict[str, Any]:
        """Return the manifest. Raises DbcapError where it is damaged."""
        path = self.folder / MANIFEST
        try:
            said = json.loads(path.read_bytes())
            if not isinstance(said, dict) or not isinstance(said["status"], str) or not isinstance(said["step"], int):
                raise ValueError("it lacks status and step")
        except (OSError, ValueError, LookupError) as error:
            hint = f"put it back from a copy; else `dbcap runs rm {self.name}` removes the run, with its checkpoints"
            raise DbcapError(f"{path} is damaged: {error}", hint) from error
        return said

    def write(self, manifest: Mapping[str, Any]) -> None:
        """Replace the manifest."""
        text = json.dumps(manifest, indent=2, ensure_ascii=False, default=str)
        write_atomic(self.folder / MANIFEST, (text + "\n").encode("utf-8", "backslashreplace"))

    def update(self, **changes: Any) -> None:
        """Change some of the manifest's values."""
        self.write(self.read() | changes)

    def state(self, said: Mapping[str, Any]) -> str:
        """Return the status that is true now: a run that was killed still says that it is running."""
        killed = said["status"] == RUNNING and not self.is_locked()
        return INTERRUPTED if killed else str(said["status"])

    def steps(self) -> dict[int, Path]:
        """Return the folders of its checkpoints by step, the oldest first."""
        found = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        names = [path for path in found if path.name.isascii() and path.name.isdigit() and (path / STATE).is_file()]
        return {int(path.name): path for path in sorted(names, key=lambda path: int(path.name))}

    def best(self) -> int | None:
        """Return the step of the best checkpoint, by the link to it; None where there is none."""
        name = Path(os.path.realpath(self.checkpoints / BEST)).name
        return next((step for step, path in self.steps().items() if path.name == name), None)

    def checkpoint(self, which: str) -> Path:
        """Return the folder of a checkpoint; `which` is a step, `last` or `best`.

        Raises UsageError, naming those there are, for one that is missing.
        """
        there = self.steps()
        named = {LAST: max(there, default=None), BEST: self.best()}
        step = named[which] if which in named else int(which) if which.isdecimal() else None
        if step is None or step not in there:
            hint = f"there are {', '.join(map(str, there))}" if there else "there is none yet"
            raise UsageError(f"the run {self.name} has no checkpoint {which}", hint)
        return there[step]

    def result(self) -> Path:
        """Return the folder of the finished model. Raises DbcapError, naming what there is instead, without one."""
        said = self.read()
        if said["status"] == FINISHED and self.final.is_dir():
            return self.final
        status, there = self.state(said), list(self.steps())
        lacks = "has lost its folder `final`" if status == FINISHED else f"is not finished, but {status}"
        hint = (
            f"run:{self.name}@{LAST} is its newest checkpoint, of step {there[-1]}" if there else "it has no checkpoint"
        )
        raise DbcapError(f"the run {self.name} {lacks}", hint)

    def is_locked(self) -> bool:
        """Return whether somebody trains it now."""
        return is_locked(self.folder / LOCK)


def now() -> str:
    """Return the time as manifests say it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def folder() -> Path:
    """Return where all runs are kept."""
    return data_dir() / "runs"


def every() -> list[Run]:
    """Return all runs, the one that was changed last first."""
    places = folder().iterdir() if folder().is_dir() else ()
    found = [Run(path) for path in places if (path / MANIFEST).is_file() and not path.name.startswith(".")]
    return sorted(found, key=lambda run: os.stat(run.folder / MANIFEST).st_mtime_ns, reverse=True)


def find(name: str) -> Run:
    """Return a run by its name. Raises UsageError where there is none."""
    known = [run.name for run in every()]
    if name not in known:
        near = did_you_mean(name, known)
        raise UsageError(f"there is no run {name}", near or "`dbcap runs list` shows those there are")
    return Run(folder() / name)


def remove(run: Run) -> int:
    """Remove a run with all its checkpoints; returns how many bytes that were.

    Raises LockHeldError while somebody trains it, UsageError where it is a link to another place.
    """
    if run.folder.is_symlink():
        raise UsageError(f"{run.folder} is a link to {run.folder.resolve()}", "remove both yourself")
    try:
        with run.lock():
            _, size = folder_size(run.folder)
            gone = run.folder.with_name(f"{_REMOVED}{run.name}")
            if gone.exists():  # of a removal that was killed
                shutil.rmtree(gone)
            run.folder.rename(gone)  # at once: a run that is half there would be listed
            shutil.rmtree(gone)
    except LockHeldError as error:
        raise LockHeldError(f"the run {run.name} is being trained", "stop that first, with Ctrl-C") from error
    return size
