"""`metrics.csv`: a line for each step, once, whatever happened to the run; and the loggers that see the same."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from dbcap.files import write_atomic

BOARD = "tensorboard"
COLUMNS = (
    *("step", "loss", "instance", "prior", "lr", "grad_norm", "seconds"),
    *("validation", "validation_instance", "validation_prior"),
)


class Table(Logger):
    """Lightning's logger for `metrics.csv`. Lines after step `start` are of a run that was killed: they go."""

    def __init__(self, path: Path, start: int) -> None:
        super().__init__()
        rows = [row for row in read(path) if int(row["step"]) <= start]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(path, text.getvalue().encode())
        self._file = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, restval="", lineterminator="\n")

    @property
    def name(self) -> str:
        """What Lightning calls it."""
        return "metrics"

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The open file."""
        return self._file

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They are in run.json."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the line of a step, at once."""
        self._writer.writerow({"step": step, **{name: f"{value:.9g}" for name, value in metrics.items()}})
        self._file.flush()

    def save(self) -> None:
        """Make what was written survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; that a full disk has no room for its end was said before."""
        with contextlib.suppress(OSError):
            self._file.close()


class Board(TensorBoardLogger):
    """Lightning's logger for TensorBoard. What was logged after step `start` by a run that was killed is dropped."""

    def __init__(self, folder: Path, start: int) -> None:
        # Files are read in the order of their names, which begin with the second in which they were made.
        while f"{int(time.time()):010d}" in {
            path.name.split(".")[3] for path in (folder / BOARD).glob("events.out.*.*")
        }:
            time.sleep(0.01)
        super().__init__(folder, name="", version=BOARD, default_hp_metric=False, purge_step=start + 1)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write what is known of a step. Raises OSError where it cannot be written."""
        try:
            super().log_metrics(metrics, step)
        except ValueError as error:  # which Lightning makes of whatever went wrong
            raise error.__cause__ or error from None

    def finalize(self, status: str) -> None:
        """Close the file; that it cannot be written was said before."""
        with contextlib.suppress(OSError):
            super().finalize(status)


def read(path: Path) -> list[dict[str, str]]:
    """Return the whole lines of a table; a last one that was cut short is none."""
    if not path.is_file():
        return []
    whole = path.read_text("utf-8", "replace").rpartition("\n")[0]
    cells = (line.split(",") for line in whole.splitlines())
    rows = {row[0]: row for row in cells if len(row) == len(COLUMNS) and row[0].isdecimal()}
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows.values()]
