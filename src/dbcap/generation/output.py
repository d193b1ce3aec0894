"""What `dbcap generate` prints: a line for each image, in the order of the plan, as soon as it is known."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dbcap.files import write_stdout
from dbcap.generation import pictures
from dbcap.generation.plan import Planned
from dbcap.inputs import shown


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
        """An image was there. JSON has the keys of one that was made, as far as the image knows them."""
        known = (pictures.facts_of(path) or {}) if self._form == "jsonl" else {}
        ours = {"key": one.job.key, "job": asdict(one.job), "seconds": None, "skipped": True}
        self._put(one, path, {**known, **ours})

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
            line = _json({"key": job.key, "job": asdict(job), "path": there or None})
        else:
            line = _text(str(job.seed), f"{job.width}x{job.height}", there or "missing", job.prompt)
        write_stdout(line)

    def close(self) -> None:
        """The run ends early: what is known goes out, though lines before it are missing for good."""
        for index in self._waiting:
            if line := self._lines.pop(index, b""):
                write_stdout(line)
        self._waiting.clear()

    def _put(self, one: Planned, path: Path, facts: Mapping[str, Any]) -> None:
        self._lines[one.index] = _json({"path": str(path), **facts}) if self._form == "jsonl" else _text(str(path))

    def _flush(self) -> None:
        while self._waiting and self._waiting[0] in self._lines:
            if line := self._lines.pop(self._waiting.popleft()):
                write_stdout(line)


def _text(*cells: str) -> bytes:
    """Return a line; tabs and line ends in it are written as escapes, bytes of a path that are no UTF-8 are kept."""
    return "\t".join(map(shown, cells)).encode("utf-8", "surrogateescape") + b"\n"


def _json(value: Mapping[str, Any]) -> bytes:
    """Return a line of JSON in UTF-8; bytes of a path that are none become JSON's own escape."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
