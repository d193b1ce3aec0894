"""The memory of an interrupted `-o FILE`: the rows in FILE.partial, and beside them how far they are sound.

FILE.partial.json holds one JSON document a line: first the settings and the inputs, then a line for each batch with the
number of inputs done, the size of FILE.partial at that point, and the inputs that failed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dbcap.errors import DbcapError, InputError, UsageError
from dbcap.inputs import Source

Failure = tuple[str, str, str]  # name, kind, message


@dataclass
class Progress:
    """How far an interrupted run came."""

    settings: Mapping[str, Any]
    sources: list[Source]
    single: bool
    done: int = 0
    size: int = 0
    failures: list[Failure] = field(default_factory=list)


class Journal:
    """FILE.partial and FILE.partial.json. Use `start` or `go_on`, then `commit` per batch, then `finish`."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.state = output.with_name(output.name + ".partial.json")
        self._rows: IO[bytes] | None = None
        self._log: IO[bytes] | None = None

    def exists(self) -> bool:
        """Tell whether there is an interrupted run."""
        return self.partial.exists() and self.state.exists()

    def discard(self) -> None:
        """Forget an interrupted run."""
        self.partial.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)

    def start(self, settings: Mapping[str, Any], sources: Sequence[Source], single: bool) -> None:
        """Begin a run."""
        self.discard()
        self._rows = self.partial.open("wb")
        self._log = self.state.open("wb")
        self._append({"settings": settings, "single": single, "inputs": [_packed(source) for source in sources]})

    def read(self) -> Progress:
        """Read how far an interrupted run came. Raises UsageError when its journal cannot be used."""
        lines = self.state.read_bytes().splitlines(keepends=True)
        entries = []
        for line in lines:
            if not line.endswith(b"\n"):
                break  # torn by the interruption
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
        try:
            first = entries[0]
            progress = Progress(first["settings"], [_unpacked(packed) for packed in first["inputs"]], first["single"])
            size = self.partial.stat().st_size
            for entry in entries[1:]:
                if entry["bytes"] > size:  # rows that the journal knows are lost: do them again
                    break
                progress.done, progress.size = entry["done"], entry["bytes"]
                progress.failures += [tuple(failure) for failure in entry["failed"]]
        except (LookupError, TypeError, ValueError) as error:
            raise UsageError(f"{self.state} is damaged", "start over with --force") from error
        return progress

    def go_on(self, progress: Progress) -> None:
        """Open the files of an interrupted run; what stands behind its last sound row is cut."""
        self._rows = self.partial.open("r+b")
        self._rows.truncate(progress.size)
        self._rows.seek(progress.size)
        sound = _sound_lines(self.state.read_bytes(), progress)
        self._log = self.state.open("r+b")
        self._log.truncate(sound)
        self._log.seek(sound)

    def commit(self, rows: bytes, done: int, failures: Sequence[Failure]) -> None:
        """Make a batch last: its rows first, then the line that says they are sound."""
        assert self._rows
        self._rows.write(rows)
        _sync(self._rows)
        self._append({"done": done, "bytes": self._rows.tell(), "failed": list(failures)})

    def finish(self, footer: bytes) -> None:
        """Give the rows their final name."""
        assert self._rows
        self._rows.write(footer)
        _sync(self._rows)
        self.close()
        os.replace(self.partial, self.output)
        self.state.unlink()

    def close(self) -> None:
        """Close both files and leave them as they are."""
        for file in (self._rows, self._log):
            if file:
                file.close()

    def _append(self, entry: Mapping[str, Any]) -> None:
        assert self._log
        self._log.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        _sync(self._log)


def _sync(file: IO[bytes]) -> None:
    try:
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise DbcapError(
            f"cannot write {file.name}: {error.strerror}", "make room, then go on with --resume"
        ) from error


def _sound_lines(data: bytes, progress: Progress) -> int:
    """Return the length of the journal up to the entry that `progress` ends with."""
    end = 0
    for line in data.splitlines(keepends=True):
        entry = json.loads(line) if line.endswith(b"\n") else None
        if entry is None or ("done" in entry and entry["done"] > progress.done):
            break
        end += len(line)
    return end


def _packed(source: Source) -> list[Any]:
    """Turn a source into a short list: most are just a name."""
    error = [source.error.kind, source.error.message, source.error.hint] if source.error else None
    packed: list[Any] = [source.name, source.root, int(source.is_url), error]
    while packed and not packed[-1]:
        packed.pop()
    return packed


def _unpacked(packed: Sequence[Any]) -> Source:
    name, root, is_url, error = [*packed, *["", 0, None][len(packed) - 1 :]]
    return Source(name, root, bool(is_url), InputError(error[1], error[2], kind=error[0]) if error else None)
