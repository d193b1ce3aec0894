"""Running `dbcap caption` in this process (fast), and in processes of its own that can be killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import dbcap_starter

GOLDEN = Path(__file__).parents[1] / "golden" / "caption"


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


@pytest.fixture(scope="session")
def samples() -> list[Path]:
    """The 24 pictures of the starter distribution."""
    return sorted(dbcap_starter.samples().glob("*.png"))


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function that loads a model folder as the command does."""
    import torch

    from dbcap.captioning import captioner
    from dbcap.events import Silent
    from dbcap.models import hub
    from dbcap.models.device import Choice

    home = tmp_path_factory.mktemp("home")

    def call(folder: Path, dtype: Any = "float32", events: Any = None, **options: Any) -> Any:
        local = hub.locate(str(folder), offline=True, events=Silent(), home=home)
        choice = Choice("cpu", dtype, 8, torch.get_num_threads(), (), "any")
        return captioner.load(local, choice, events or Silent(), **options)

    return call


@pytest.fixture(scope="session")
def served(samples) -> Iterator[str]:
    """A server of the first sample (0.png) and of what fails; the URL has a login in it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(0.5 if self.path == "/slow.png" else 0)
            body = bytes(1_000_001) if self.path == "/large.png" else samples[0].read_bytes()
            self.send_response(404 if self.path == "/missing.png" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://me:secret@127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a busy machine two threads wait for each other longer than they work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def work(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one, with an isolated home."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DBCAP_CAPTION__MODEL", "starter")
    monkeypatch.setenv("DBCAP_CAPTION__DTYPE", "float32")
    monkeypatch.setenv("DBCAP_CAPTION__NUM_BEAMS", "1")
    return folder


@pytest.fixture
def photos(work: Path, samples: Sequence[Path]) -> Path:
    """A folder `photos` with three of the samples, a.png to c.png."""
    folder = work / "photos"
    folder.mkdir()
    for name, sample in zip("abc", samples, strict=False):
        shutil.copyfile(sample, folder / f"{name}.png")
    return folder


@pytest.fixture
def caption(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Callable[..., Result]:
    """Return a function that runs `dbcap caption WORDS` in this process: greedily, in float32, with the starter."""
    import torch

    from dbcap.cli.app import run

    torch.set_num_threads(1)  # on a busy machine two threads wait for each other longer than they work

    def call(*words: str | os.PathLike[str], stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfdbinary.readouterr()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            code = run(["caption", *map(os.fspath, words)])
        finally:
            signal.signal(signal.SIGTERM, handler)
        out, err = capfdbinary.readouterr()
        return Result(code, out, err.decode("utf-8", "surrogateescape"))

    return call


# ---- processes of their own

_ZYGOTE = """
import json, os, resource, signal, sys
import dbcap.captioning.captioner, dbcap.captioning.run, dbcap.models.hub, dbcap.cli.caption
from dbcap.cli.app import run

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


class Running:
    """A `dbcap` in a process of its own."""

    def __init__(self, zygote: subprocess.Popen[str], pid: int, out: Path, err: Path) -> None:
        self._zygote = zygote
        self.pid = pid
        self._out, self._err = out, err
        self._code: int | None = None

    def wait(self, seconds: float = 60) -> Result:
        """Return what came of it; the exit code of one that a signal killed is negative."""
        assert self._zygote.stdout
        if self._code is None:
            if not select.select([self._zygote.stdout], [], [], seconds)[0]:
                self.signal(signal.SIGKILL)
                self._zygote.stdout.readline()
                pytest.fail(f"dbcap did not end within {seconds} seconds: {self.said('err')!r}")
            self._code = int(self._zygote.stdout.readline())
        return Result(self._code, self.said(), self.said("err").decode("utf-8", "surrogateescape"))

    def alive(self) -> bool:
        """Tell whether it is still running."""
        assert self._zygote.stdout
        return self._code is None and not select.select([self._zygote.stdout], [], [], 0)[0]

    def said(self, where: str = "out") -> bytes:
        """Return what is on its stdout (or `err`) so far."""
        path = self._out if where == "out" else self._err
        return path.read_bytes() if path.exists() else b""  # it may be killed before it has opened them

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)


@pytest.fixture(scope="session")
def zygotes() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that have everything imported: a fork of one is a real process that starts at once."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def start(work: Path, tmp_path: Path, zygotes: list[subprocess.Popen[str]]) -> Callable[..., Running]:
    """Return a function that starts `dbcap caption WORDS` as a process. `most`: no file may have more bytes."""
    running: list[Running] = []

    def call(*words: str | os.PathLike[str], most: int = 0) -> Running:
        busy = [one._zygote for one in running if one._code is None]
        free = [zygote for zygote in zygotes if zygote not in busy]
        if not free:
            zygotes.append(
                subprocess.Popen(
                    [sys.executable, "-c", _ZYGOTE],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    bufsize=1,
                )
            )
            free = zygotes[-1:]
            assert free[0].stdout
            assert free[0].stdout.readline() == "ready\n"
        out, err = (tmp_path / f"{name}-{len(running)}" for name in ("out", "err"))
        order = {
            "words": ["caption", *map(os.fspath, words)],
            "folder": str(Path.cwd()),
            "environment": dict(os.environ),
            "out": str(out),
            "err": str(err),
            "most": most,
        }
        assert free[0].stdin
        assert free[0].stdout
        free[0].stdin.write(json.dumps(order) + "\n")
        free[0].stdin.flush()
        running.append(Running(free[0], int(free[0].stdout.readline()), out, err))
        return running[-1]

    yield call
    for one in running:
        if one.alive():
            one.signal(signal.SIGKILL)
        one.wait()


def until(true: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.002)


@pytest.fixture(name="until")
def _until() -> Callable[..., None]:
    return until
