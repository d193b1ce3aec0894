"""What the tests of training share: the commands as their users run them, on three photos and a tiny model."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dbcap import runs
from dbcap.cli.app import run as command
from dbcap.events import Silent
from dbcap.runs import Run
from dbcap.testing.processes import Processes, Result, Running, until

QUICK = [
    *("--no-progress", "--precision", "32", "--lr", "1e-4", "--steps", "6"),
    *("--checkpoint-every", "0", "--validate-every", "0", "--sample-every", "0"),
]


class Training:
    """`dbcap train` and `dbcap resume` in this process."""

    def __init__(self, data: Path, capfd: pytest.CaptureFixture[bytes]) -> None:
        self.data, self._capfd = data, capfd

    def __call__(self, *words: str | os.PathLike[str]) -> Result:
        """Run a command line."""
        self._capfd.readouterr()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        handlers = {number: signal.getsignal(number) for number in numbers}
        try:
            code = command([*map(os.fspath, words)])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = self._capfd.readouterr()
        return Result(code, out, err.decode("utf-8", "surrogateescape"))

    def words(self, name: str, *words: str, data: Path | None = None) -> list[str]:
        """Return the words of a command that trains for 6 steps."""
        return ["train", str(data or self.data), "--name", name, *QUICK, *words]

    def train(self, name: str, *words: str, data: Path | None = None) -> Run:
        """Train to the end."""
        result = self(*self.words(name, *words, data=data))
        assert result.code == 0, result.err
        return Run(runs.folder() / name)

    def resume(self, *words: str) -> Result:
        """Go on, to the end."""
        result = self("resume", *words)
        assert result.code == 0, result.err
        return result

    def refused(self, *words: str | os.PathLike[str], code: int = 2) -> str:
        """Return the one line of a command that does nothing."""
        result = self(*words)
        assert result.code == code, result.err
        assert result.out == b""
        return result.error


def weights(run: Run) -> dict[str, str]:
    """Return the hash of each file of weights that a run made."""
    found = {path.relative_to(run.final).as_posix(): path for path in run.final.rglob("*.safetensors")}
    assert found
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


def lines(run: Run) -> list[str]:
    """Return the metrics of a run, all but the seconds."""
    return [",".join(line.split(",")[:6] + line.split(",")[7:]) for line in run.metrics.read_text().splitlines()]


@pytest.fixture(name="weights")
def _weights() -> Callable[[Run], dict[str, str]]:
    return weights


@pytest.fixture(name="lines")
def _lines() -> Callable[[Run], list[str]]:
    return lines


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine two threads wait for each other longer than they work."""
    import torch

    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def training(
    home: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Training:
    """The commands, with an isolated home."""
    from dbcap.training import preflight

    monkeypatch.setattr(
        preflight, "forward_pass", lambda *_: preflight.Work(1.0, 0)
    )  # estimating it takes as long as three steps
    return Training(tiny_dataset, capfdbinary)


@pytest.fixture(scope="session")
def known() -> dict[tuple[str, ...], tuple[dict[str, str], list[str]]]:
    """What uninterrupted runs have made."""
    return {}


@pytest.fixture
def straight(training: Training, known: dict[tuple[str, ...], tuple[dict[str, str], list[str]]]) -> Callable[..., Any]:
    """Return a function that gives weights and metrics of an uninterrupted run with these words, called rex.

    It is to be called before there is another of that name.
    """

    def call(*words: str) -> tuple[dict[str, str], list[str]]:
        if words not in known:
            run = training.train("rex", *words)
            known[words] = weights(run), lines(run)
            runs.remove(run)
        return known[words]

    return call


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Return a function that has something happen at the end of a step, as its metrics are written; once."""
    from dbcap.training.metrics import Table

    due: dict[int, Callable[[], object]] = {}
    write = Table.log_metrics

    def log_metrics(self: Table, metrics: dict[str, float], step: int) -> None:
        write(self, metrics, step)
        if step in due:
            due.pop(step)()

    monkeypatch.setattr(Table, "log_metrics", log_metrics)
    return due.__setitem__


@pytest.fixture
def interrupted(training: Training, at_step: Callable[..., None]) -> Callable[..., Result]:
    """Return a function that runs a command and sends it Ctrl-C at a step."""

    def call(step: int, *words: str) -> Result:
        at_step(step, lambda: signal.raise_signal(signal.SIGINT))
        result = training(*words)
        assert result.code == 130, result.err
        return result

    return call


@pytest.fixture
def told() -> Told:
    """Events that remember what they were told."""
    return Told()


class Told(Silent):
    """What was said and warned of."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.warned.append(message)


# ---- processes of their own


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Where processes come from."""
    with Processes("dbcap.training.session", "dbcap.training.run", "dbcap.cli.train", "dbcap.cli.resume") as found:
        yield found


@pytest.fixture
def start(training: Training, tmp_path: Path, processes: Processes) -> Iterator[Callable[..., Running]]:
    """Return a function that starts `dbcap WORDS` as a process."""
    with processes.within(tmp_path) as call:
        yield call


@pytest.fixture(name="until")
def _until() -> Callable[..., None]:
    return until
