"""What `dbcap generate` prints: a line for each image, in the order of the plan, as soon as it is known."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dbcap.files import write_stdout
from dbcap.generation.plan import Planned


class Printer:
    """Holds lines back until those before them are known."""

    def __init__(self, form: str) -> None:
        self._form = form
        self._waiting: deque[int] = deque()
        self._lines: dict[int, bytes] = {}
        self._same: dict[int, list[Planned]] = {}

    def expect(self, indices: Iterable[int]) -> None:
        """Say in which order lines go out; what is known already goes at once."""
        self._waiting = deque(indices)
        self._flush()

    def made(self, one: Planned, path: Path, facts: Mapping[str, Any]) -> None:
        """An image was written."""
        self._put(one, path, {**facts, "skipped": False})
        for other in self._same.get(one.index, ()):
            self._put(other, path, {**facts, "skipped": True})
        self._flush()

    def skipped(self, one: Planned, path: Path) -> None:
        """An image was there."""
        self._put(one, path, {"key": one.job.key, "job": asdict(one.job), "skipped": True})

    def same(self, one: Planned, first: int) -> None:
        """A job stands twice in the plan: its line waits for the first one's."""
        self._same.setdefault(first, []).append(one)

    def failed(self, one: Planned) -> None:
        """An image failed: it has no line."""
        for each in (one, *self._same.get(one.index, ())):
            self._lines[each.index] = b""
        self._flush()

    def plan(self, one: Planned, there: str) -> None:
        """Print what would be made, and where it is if it need not."""
        job = one.job
        if self._form == "jsonl":
            line = json.dumps({"key": job.key, "job": asdict(job), "path": there or None}, ensure_ascii=False)
        else:
            line = f"{job.seed}\t{job.width}x{job.height}\t{there or 'missing'}\t{job.prompt}"
        write_stdout(line.encode("utf-8", "surrogateescape") + b"\n")

    def _put(self, one: Planned, path: Path, facts: Mapping[str, Any]) -> None:
        line = json.dumps({"path": str(path), **facts}, ensure_ascii=False) if self._form == "jsonl" else str(path)
        self._lines[one.index] = line.encode("utf-8", "surrogateescape") + b"\n"

    def _flush(self) -> None:
        while self._waiting and self._waiting[0] in self._lines:
            if line := self._lines.pop(self._waiting.popleft()):
                write_stdout(line)
