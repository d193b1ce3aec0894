"""The memory of an interrupted `-o FILE`: the rows in FILE.partial, and beside them how far they are sound.

FILE.partial.json holds one JSON document a line: first the settings and the inputs, then a line for each batch with the
number of inputs done, the size of FILE.partial at that point, and the inputs that failed. There is never a FILE.partial
without its FILE.partial.json: the latter is complete before the former is made, and goes after it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbcap.errors import DbcapError, InputError, UsageError
from dbcap.files import sync_folder, write_atomic
from dbcap.inputs import Source

Failure = tuple[str, str, str]  # name, kind, message


@dataclass
class Progress:
    """How far an interrupted run came."""

    settings: Mapping[str, Any]
    sources: list[Source]
    single: bool
    done: int = 0
    """Inputs, failed ones included."""
    size: int = 0
    """Bytes of FILE.partial that are sound."""
    journal_size: int = 0
    """Bytes of FILE.partial.json that are sound."""
    failures: list[Failure] = field(default_factory=list)


class Journal:
    """FILE.partial and FILE.partial.json. Use `start` or `go_on`, then `commit` per batch, then `finish`.

    Files that cannot be written raise DbcapError.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.state = output.with_name(output.name + ".partial.json")
        self._rows: _Appended | None = None
        self._log: _Appended | None = None

    def exists(self) -> bool:
        """Tell whether there is an interrupted run."""
        return self.partial.exists()

    def start(self, settings: Mapping[str, Any], sources: Sequence[Source], single: bool) -> None:
        """Begin a run; an interrupted one is forgotten."""
        first = {"settings": settings, "single": single, "inputs": [_packed(source) for source in sources]}
        with _said_plainly(self.partial):
            self.partial.unlink(missing_ok=True)
        with _said_plainly(self.state):
            write_atomic(self.state, _line(first))
        self._log = _Appended(self.state, self.state.stat().st_size)
        self._rows = _Appended(self.partial, 0)
        sync_folder(self.partial.parent)

    def read(self) -> Progress:
        """Read how far an interrupted run came. Raises UsageError when its journal cannot be used."""
        try:
            lines = self.state.read_bytes().split(b"\n")[:-1]  # what has no line end was torn by the interruption
            first = json.loads(lines[0])
            progress = Progress(
                first["settings"],
                [_unpacked(packed) for packed in first["inputs"]],
                first["single"],
                journal_size=len(lines[0]) + 1,
            )
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise UsageError(
                f"{self.partial} is there, but its {self.state.name} is missing or damaged", "start over with --force"
            ) from error
        size = self.partial.stat().st_size
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                done, end, failed = entry["done"], entry["bytes"], [_failure(*item) for item in entry["failed"]]
                sound = progress.done <= done <= len(progress.sources) and progress.size <= end <= size
            except (LookupError, TypeError, ValueError):
                break
            if not sound:  # rows that the journal knows are lost: they are made again
                break
            progress.done, progress.size = done, end
            progress.journal_size += len(line) + 1
            progress.failures += failed
        return progress

    def go_on(self, progress: Progress) -> None:
        """Open the files of an interrupted run; what stands behind the last sound row is cut."""
        self._rows = _Appended(self.partial, progress.size)
        self._log = _Appended(self.state, progress.journal_size)

    def commit(self, rows: bytes, done: int, failures: Sequence[Failure]) -> None:
        """Make a batch last: its rows first, then the line that says they are sound."""
        assert self._rows
        assert self._log
        self._rows.append(rows)
        self._log.append(_line({"done": done, "bytes": self._rows.size, "failed": list(failures)}))

    def finish(self, footer: bytes) -> None:
        """Give the rows their final name."""
        assert self._rows
        self._rows.append(footer)
        self.close()
        with _said_plainly(self.output):
            os.replace(self.partial, self.output)
            sync_folder(self.output.parent)
            self.state.unlink()

    def forget(self) -> None:
        """Remove both files of a run that has nothing to go on from."""
        with contextlib.suppress(OSError):
            self.partial.unlink()
            self.state.unlink()

    def tidy(self) -> None:
        """Remove what a run leaves that is killed at the very end, when FILE has its name already."""
        with contextlib.suppress(OSError):
            self.state.unlink()

    def close(self) -> None:
        """Close both files and leave them as they are."""
        for file in (self._rows, self._log):
            if file:
                file.close()


class _Appended:
    """A file that grows at its end, from `size` bytes on; every piece is on disk when `append` returns."""

    def __init__(self, path: Path, size: int) -> None:
        self.size = size
        self._path = path
        with _said_plainly(path):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            os.ftruncate(self._file, size)
            os.lseek(self._file, size, os.SEEK_SET)

    def append(self, data: bytes) -> None:
        rest = memoryview(data)
        with _said_plainly(self._path):
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        self.size += len(data)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@contextlib.contextmanager
def _said_plainly(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DbcapError(
            f"cannot write {path}: {error.strerror}", "once that is mended, the same command with --resume goes on"
        ) from error


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _failure(name: str, kind: str, message: str) -> Failure:
    return name, kind, message


def _packed(source: Source) -> list[Any]:
    """Turn a source into a short list: most are just a name."""
    error = [source.error.kind, source.error.message, source.error.hint] if source.error else None
    packed: list[Any] = [source.name, source.root, int(source.is_url), error]
    while len(packed) > 1 and not packed[-1]:
        packed.pop()
    return packed


def _unpacked(packed: Sequence[Any]) -> Source:
    name, root, is_url, error = list(packed) + ["", 0, None][len(packed) - 1 :]
    return Source(name, root, bool(is_url), InputError(error[1], error[2], kind=error[0]) if error else None)
