"""Where everything that dbcap says goes: data to stdout, talk to stderr, both to the log file when there is one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbcap.errors import ConfigError
from dbcap.events import Silent, Tracker
from dbcap.files import write_stdout

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from dbcap.config.models import CommonConfig


_WIDE = 1_000_000
"""Columns of what has no width of its own, as a file."""


def print_lines(lines: Sequence[str]) -> None:
    """Write lines to stdout, in UTF-8 whatever the locale."""
    write_stdout("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))


def print_json(value: Any) -> None:
    """Write one JSON document to stdout."""
    print_lines([json.dumps(value, indent=2, ensure_ascii=False, default=str)])


def close_stdout() -> None:
    """Let go of a stdout whose reader has gone, so that the interpreter does not complain on its way out."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)


class Terminal:
    """The `Events` of the command line, on stderr."""

    def __init__(
        self, *, quiet: bool = False, verbose: bool = False, progress: bool = True, log_file: str | None = None
    ) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self._progress = progress and not quiet and _is_terminal(sys.stderr)
        self._log = _open_log(log_file) if log_file else None
        self.live: Console | None = None  # the console of a progress display, which lines must go around

    @classmethod
    def of(cls, config: CommonConfig) -> Terminal:
        """Build from the settings."""
        return cls(quiet=config.quiet, verbose=config.verbose, progress=config.progress, log_file=config.log_file)

    def say(self, message: str) -> None:
        self._line(message, "", shown=not self._quiet)

    def warn(self, message: str) -> None:
        self._line(f"warning: {message}", "yellow", shown=not self._quiet)

    def fail(self, message: str) -> None:
        self._line(f"failed: {message}", "red")

    def error(self, message: str) -> None:
        """Say why the command ends."""
        self._line(f"error: {message}", "bold red")

    def detail(self, message: str) -> None:
        self._line(message, "dim", shown=self._verbose)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> None:
        """Show a table as wide as the terminal or as it needs. `right` are columns of numbers; cells may have lines."""
        table = _grid(columns, rows, right)
        if self._log:
            for line in _lines_of(table):
                self._record(line)
        if self._quiet or sys.stderr is None:
            return
        with contextlib.suppress(OSError):
            (self.live or stderr_console(None if _is_terminal(sys.stderr) else _WIDE)).print(table)

    def help(self, text: str) -> None:
        """Show the help of a group of commands that was called without one."""
        if sys.stderr:
            sys.stderr.write(f"{text}\n" if text else "")

    def _line(self, message: str, style: str, shown: bool = True) -> None:
        text = printable(message)
        self._record(text)
        if not shown or sys.stderr is None:
            return
        with contextlib.suppress(OSError):
            if self.live or _is_terminal(sys.stderr):
                console = self.live or stderr_console()
                console.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)
            else:
                sys.stderr.write(text + "\n")
                sys.stderr.flush()

    def _record(self, text: str) -> None:
        with contextlib.suppress(OSError):  # that nobody can be told must not change what the run does
            if self._log:
                self._log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")
                self._log.flush()

    def track(self, title: str, total: int | None, unit: str = "images") -> AbstractContextManager[Tracker]:
        return _Bar(self, title, total, unit) if self._progress else Silent().track(title, total, unit)


class _Bar:
    """Progress on a terminal, shown while it is entered."""

    def __init__(self, terminal: Terminal, title: str, total: int | None, unit: str) -> None:
        self._terminal = terminal
        self._console = stderr_console()
        self._progress = _progress(self._console, unit)
        self._task = self._progress.add_task(title, total=total, failed="", note="")
        self._failed = 0

    def __enter__(self) -> _Bar:
        self._terminal.live = self._console
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()
        self._terminal.live = None

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def fail(self, count: int = 1) -> None:
        self._failed += count
        self._progress.update(self._task, advance=count, failed=f"{self._failed} failed")

    def note(self, words: str) -> None:
        self._progress.update(self._task, note=words)


def _is_terminal(stream: Any) -> bool:
    return stream is not None and bool(stream.isatty())  # a stream that the caller closed is None


def stderr_console(width: int | None = None) -> Console:
    """Return a rich console on stderr. With NO_COLOR it is plain: rich alone would still print bold and dim."""
    from rich.console import Console

    return Console(stderr=True, width=width, color_system=None if os.environ.get("NO_COLOR") else "auto")


def _progress(console: Console, unit: str) -> Progress:
    from rich import progress as rp
    from rich.text import Text

    class Rate(rp.ProgressColumn):
        def render(self, task: rp.Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.1f} {unit}/s" if speed else "", style="progress.data.speed")

    sizes: list[Any] = (
        [rp.DownloadColumn(), rp.TransferSpeedColumn()] if unit == "bytes" else [rp.MofNCompleteColumn(), Rate()]
    )
    return rp.Progress(
        rp.TextColumn("{task.description}"),
        rp.BarColumn(),
        *sizes,
        rp.TimeRemainingColumn(elapsed_when_finished=True),
        rp.TextColumn("[red]{task.fields[failed]}"),
        rp.TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=True,
    )


def printable(message: str) -> str:
    """Make one line of a message: names may hold newlines, terminal codes and bytes that are no UTF-8."""
    text = message.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _open_log(name: str) -> Any:
    path = Path(name)
    try:
        if path.is_file() and b"\0" in path.open("rb").read(4096):
            raise ConfigError(f"--log-file {name} is no text file", "name another; an existing log is added to")
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write --log-file {name}: {error.strerror}") from error


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout: boxed for a person, tab-separated for a pipe."""
    if not _is_terminal(sys.stdout):
        print_lines(["\t".join(printable(cell) for cell in row) for row in rows])
        return
    from rich.console import Console

    table = _grid(columns, [[printable(cell) for cell in row] for row in rows])
    table.title, table.title_justify = title, "left"
    Console(color_system=None if os.environ.get("NO_COLOR") else "auto").print(table)


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> Table:
    """Return a table whose cells are folded where there is too little room, and never cut."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("\n".join(map(printable, cell.split("\n")))) for cell in row))
    return table


def _lines_of(table: Table) -> list[str]:
    from rich.console import Console

    console = Console(width=_WIDE, color_system=None, file=io.StringIO())
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]
