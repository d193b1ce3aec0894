"""Running `dbcap caption` in this process (fast), and in processes of its own that can be killed."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import dbcap_starter
from dbcap.testing.processes import Processes, Result, Running, until

GOLDEN = Path(__file__).parents[1] / "golden" / "caption"


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


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Where processes come from."""
    with Processes(
        "dbcap.captioning.captioner", "dbcap.captioning.run", "dbcap.models.hub", "dbcap.cli.caption"
    ) as found:
        yield found


@pytest.fixture
def start(work: Path, tmp_path: Path, processes: Processes) -> Iterator[Callable[..., Running]]:
    """Return a function that starts `dbcap caption WORDS` as a process. `most`: no file may have more bytes."""
    with processes.within(tmp_path) as call:
        yield partial(call, "caption")


@pytest.fixture(name="until")
def _until() -> Callable[..., None]:
    return until
