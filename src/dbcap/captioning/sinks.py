"""Where captions go: a stream, a file that survives interruptions, or places beside the images."""

from __future__ import annotations

import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from dbcap.captioning.journal import Failure, Journal, Progress
from dbcap.captioning.records import Existing, Placed, json_bytes
from dbcap.errors import DbcapError, InputError, UsageError
from dbcap.files import lock_beside, write_stdout
from dbcap.inputs import Source, shown
from dbcap.plugins.api import Record, Writer

Row = tuple[Source, Record]
FLUSH_SECONDS = 10.0


class Sink(Protocol):
    """What the run writes to. `done` counts inputs from the start, failed ones included."""

    def write(self, rows: Sequence[Row], done: int, failures: Sequence[Failure]) -> list[tuple[Source, InputError]]:
        """Write a batch; returns the inputs whose caption could not be put in its place."""

    def finish(self) -> None:
        """Complete the output."""

    def close(self) -> None:
        """Let go after an interruption; what is written stays."""


class Stream:
    """Rows as they come, to stdout or a pipe."""

    def __init__(self, writer: Writer, write: Callable[[bytes], None]) -> None:
        self._writer = writer
        self._write = write
        self._rows = 0
        if header := writer.header():
            write(header)

    def write(self, rows: Sequence[Row], done: int, failures: Sequence[Failure]) -> list[tuple[Source, InputError]]:  # noqa: ARG002
        """Write a batch at once, so that a reader sees it early."""
        if data := _render(self._writer, rows, self._rows == 0):
            self._write(data)
        self._rows += len(rows)
        return []

    def finish(self) -> None:
        """Write what closes the document."""
        if footer := self._writer.footer(self._rows == 0):
            self._write(footer)

    def close(self) -> None:
        """Do nothing: all is written."""


class Resumable:
    """Rows of `-o FILE`, through a journal."""

    def __init__(self, journal: Journal, writer: Writer, progress: Progress | None) -> None:
        self._journal = journal
        self._writer = writer
        self._empty = True
        if progress:
            journal.go_on(progress)
            self._empty = progress.done == len(progress.failures)
        self._header = b"" if progress and progress.size else writer.header()

    def write(self, rows: Sequence[Row], done: int, failures: Sequence[Failure]) -> list[tuple[Source, InputError]]:
        """Write a batch and make it last."""
        self._journal.commit(self._header + _render(self._writer, rows, self._empty), done, failures)
        self._header = b""
        self._empty = self._empty and not rows
        return []

    def finish(self) -> None:
        """Give the file its name."""
        self._journal.finish(self._header + self._writer.footer(self._empty))

    def close(self) -> None:
        """Leave the partial file for `--resume`."""
        self._journal.close()


class Beside:
    """Captions in files beside the images."""

    def __init__(self, placed: Placed, existing: Existing) -> None:
        self._placed = placed
        self._existing = existing
        self._flushed = time.monotonic()

    def write(self, rows: Sequence[Row], done: int, failures: Sequence[Failure]) -> list[tuple[Source, InputError]]:  # noqa: ARG002
        """Write each caption to its place; what shares a file is put on disk every few seconds."""
        failed = []
        for source, record in rows:
            try:
                self._placed.write(source, record, self._existing)
            except InputError as error:
                failed.append((source, error))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._placed.flush()
            self._flushed = time.monotonic()
        return failed

    def finish(self) -> None:
        """Put everything on disk."""
        self._placed.flush()

    close = finish


def _render(writer: Writer, rows: Sequence[Row], first: bool) -> bytes:
    return b"".join(writer.row(record, first and number == 0) for number, (_, record) in enumerate(rows))


def stream_target(name: str | None, stack: ExitStack) -> Callable[[bytes], None] | None:
    """Return how to write to stdout or to a file that is none (a pipe, a device); None for a regular or new file."""
    number = 1 if name in (None, "-") else _descriptor(str(name))
    if number == 1:
        return write_stdout
    try:
        if number is None:
            mode = os.stat(str(name)).st_mode
            if stat.S_ISREG(mode):
                return None
            if stat.S_ISDIR(mode):
                raise UsageError(f"{name} is a folder", "name a file with -o")
        # A descriptor is duplicated: opening it by its name would empty the file behind it.
        target = str(name) if number is None else os.dup(number)
        file = stack.enter_context(open(target, "wb", buffering=0))  # noqa: SIM115 - the stack closes it
    except FileNotFoundError:
        if name:
            return None
        raise UsageError("-o '' names no file", "name one, or leave -o out") from None
    except OSError as error:
        raise UsageError(f"cannot write {name}: {error.strerror}") from error
    return lambda data: _write_all(file, data, str(name))


def _descriptor(name: str) -> int | None:
    """Return the number of the open file that such a name stands for."""
    if name in ("/dev/stdout", "/dev/stderr"):
        return 1 if name == "/dev/stdout" else 2
    match = re.fullmatch(r"(?:/dev/fd|/proc/self/fd)/(\d+)", name)
    return int(match[1]) if match else None


def _write_all(file: Any, data: bytes, name: str) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DbcapError(f"cannot write {name}: {error.strerror}", "make room, or write elsewhere") from error


def on_terminal(write: Callable[[bytes], None]) -> bool:
    """Tell whether this way of a stream leads to a terminal."""
    return write is write_stdout and sys.stdout is not None and sys.stdout.isatty()


def open_journal(name: str, *, resume: bool, force: bool, locked: bool, stack: ExitStack) -> Journal | None:
    """Lock FILE, unless it is `locked`, and decide whether there is something to do: None where `--resume` is done.

    A link keeps being one: what it leads to is written.
    """
    output = Path(os.path.realpath(name))
    if not output.parent.is_dir():
        raise UsageError(f"there is no folder {output.parent}", "create it first")
    if not locked:
        stack.enter_context(lock_beside(output))
    journal = Journal(output)
    if resume and not journal.exists() and output.exists():
        journal.tidy()
        return None
    if resume or force:
        return journal
    if journal.exists():
        raise UsageError(f"{name} was interrupted", "--resume goes on with it, --force starts over")
    if output.exists():
        raise UsageError(f"{name} exists", "--force replaces it")
    return journal


def refuse_other_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise UsageError when an interrupted run used settings that would give other bytes."""
    for key in new:
        if old.get(key) != new[key]:
            raise UsageError(
                f"--resume: the interrupted run has {key} {_shown(old.get(key))}, this one {_shown(new[key])}",
                "use the same again, or start over with --force",
            )


def _shown(value: Any) -> str:
    text = shown("none" if value is None else str(value)) or "''"
    return text if len(text) <= 100 else text[:99] + "…"


class ErrorLog:
    """`--errors FILE`: one JSON line for each failed input. It is opened early, and emptied when the work begins."""

    def __init__(self, name: str | None, stack: ExitStack) -> None:
        self._name = name
        self._file: IO[bytes] | None = None
        if name:
            try:
                self._file = stack.enter_context(open(name, "ab", buffering=0))  # noqa: SIM115 - likewise
            except OSError as error:
                raise UsageError(f"cannot write --errors {name}: {error.strerror}") from error

    def start(self, failures: Iterable[Failure]) -> None:
        """Replace the content by the failures of an interrupted run."""
        if self._file:
            with self._said_plainly():
                if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                    self._file.truncate(0)
        for failure in failures:
            self.add(failure)

    def add(self, failure: Failure) -> None:
        """Write one failed input at once."""
        if self._file:
            path, kind, message = failure
            line = json_bytes({"path": path, "kind": kind, "message": message}) + b"\n"
            _write_all(self._file, line, f"--errors {self._name}")

    @contextmanager
    def _said_plainly(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DbcapError(f"cannot write --errors {self._name}: {error.strerror}") from error
