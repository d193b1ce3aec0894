"""`dbcap` in processes of its own, which signals can be sent to. They are forked from ones that have all imported."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

_ZYGOTE = """
import importlib, json, os, resource, signal, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
from dbcap.cli.app import run

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        try:
            os.chdir(order["folder"])
            os.environ.clear()
            os.environ.update(order["environment"])
            for number, name in ((0, os.devnull), (1, order["out"]), (2, order["err"])):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY, 0o666), number)
            if order["most"]:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["most"], order["most"]))
            code = run(order["words"])
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            code = 99
        sys.exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Result:
    """What came of a command."""

    code: int
    out: bytes
    err: str

    @property
    def lines(self) -> list[str]:
        """Of stdout, as text."""
        return self.out.decode("utf-8", "surrogateescape").splitlines()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of JSON lines on stdout."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> str:
        """The one line that says why a command ended."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return line.removeprefix("error: ")


class Running:
    """A `dbcap` in a process of its own."""

    def __init__(self, zygote: subprocess.Popen[str], pid: int, out: Path, err: Path) -> None:
        self.zygote, self.pid = zygote, pid
        self._out, self._err = out, err
        self.code: int | None = None

    def wait(self, seconds: float = 120) -> Result:
        """Return what came of it; the exit code of one that a signal killed is negative."""
        assert self.zygote.stdout
        if self.code is None:
            if not select.select([self.zygote.stdout], [], [], seconds)[0]:
                self.signal(signal.SIGKILL)
                self.code = int(self.zygote.stdout.readline())
                pytest.fail(f"dbcap did not end within {seconds} seconds: {self.said('err')!r}")
            self.code = int(self.zygote.stdout.readline())
        return Result(self.code, self.said(), self.said("err").decode("utf-8", "surrogateescape"))

    def alive(self) -> bool:
        """Tell whether it is still running."""
        assert self.zygote.stdout
        return self.code is None and not select.select([self.zygote.stdout], [], [], 0)[0]

    def said(self, where: str = "out") -> bytes:
        """Return what is on its stdout (or `err`) so far."""
        path = self._out if where == "out" else self._err
        return path.read_bytes() if path.exists() else b""  # it may be killed before it has opened them

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Processes:
    """Starts `dbcap` in processes that have these modules imported."""

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._zygotes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._zygotes:
            process.kill()
            process.wait()

    @contextlib.contextmanager
    def within(self, folder: Path) -> Iterator[Callable[..., Running]]:
        """Give a function that starts `dbcap WORDS` in the current folder; what is left of them is killed in the end.

        What they print goes to files in `folder`. With `most` no file that they write may have more bytes.
        """
        running: list[Running] = []

        def start(*words: str | os.PathLike[str], most: int = 0) -> Running:
            busy = [one.zygote for one in running if one.code is None]
            zygote = next((one for one in self._zygotes if one not in busy), None) or self._zygote()
            out, err = (folder / f"{name}-{len(running)}" for name in ("out", "err"))
            order = {
                "words": [os.fspath(word) for word in words],
                "folder": str(Path.cwd()),
                "environment": dict(os.environ),
                "out": str(out),
                "err": str(err),
                "most": most,
            }
            assert zygote.stdin
            assert zygote.stdout
            zygote.stdin.write(json.dumps(order) + "\n")
            zygote.stdin.flush()
            running.append(Running(zygote, int(zygote.stdout.readline()), out, err))
            return running[-1]

        yield start
        for one in running:
            if one.alive():
                one.signal(signal.SIGKILL)
            one.wait()

    def _zygote(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _ZYGOTE, *self._modules],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._zygotes.append(process)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process


def until(true: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.002)
