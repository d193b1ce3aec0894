"""Three ways to run dbcap: in this process (fast), in one of its own, and on a terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

PLUGINS = Path(__file__).parent.parent / "plugins"


class Result(NamedTuple):
    """What came of a command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error: fails where there is more or less on stderr than that."""
        assert self.err.startswith("error: "), self.err
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        assert self.out == ""
        return self.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def project(home, tmp_path, monkeypatch) -> Path:
    """An empty folder that is the current one, with an isolated home."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def cli(project, monkeypatch, capsys) -> Callable[..., Result]:
    """Return a function that runs a command line in this process."""
    from dbcap.cli.app import run

    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):  # set by commands; taken back after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    handler = signal.getsignal(signal.SIGTERM)

    def call(*words: str) -> Result:
        capsys.readouterr()
        try:
            code = run(words)
        finally:
            signal.signal(signal.SIGTERM, handler)
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def process(project) -> Callable[..., Result]:
    """Return a function that runs a command line in a fresh process."""

    def call(*words: str, input: str = "", env: dict[str, str] | None = None) -> Result:  # noqa: A002
        done = subprocess.run(
            [sys.executable, "-m", "dbcap", *words],
            input=input.encode(),
            capture_output=True,
            env={**os.environ, **(env or {})},
            timeout=300,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return call


@pytest.fixture
def bash(project, tmp_path, monkeypatch) -> Callable[..., Result]:
    """Return a function that runs a bash script in which `dbcap` is a command."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "dbcap").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dbcap "$@"\n')
    (folder / "dbcap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def call(script: str) -> Result:
        done = subprocess.run(["bash", "-c", textwrap.dedent(script)], capture_output=True, timeout=300)
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return call


@pytest.fixture
def on_terminal(project) -> Callable[..., tuple[int, str]]:
    """Return a function that runs Python's words with stdout and stderr on a terminal: exit code and what it showed."""

    def call(*words: str, env: dict[str, str] | None = None) -> tuple[int, str]:
        master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", **(env or {})}
        for name in [name for name, value in environment.items() if value == ""]:
            del environment[name]
        child = subprocess.Popen([sys.executable, *words], stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        shown = b""
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # what Linux says when the other end is closed
                break
            if not chunk:
                break
            shown += chunk
        os.close(master)
        return child.wait(60), shown.decode().replace("\r\n", "\n")

    return call


@pytest.fixture
def plugins(home, monkeypatch) -> Callable[..., None]:
    """Return a function that installs test plugins, by name or by path, for this process and its children."""
    from dbcap.plugins import loader

    def install(*names: str | Path) -> None:
        folders = [str(PLUGINS / name) for name in names]
        for folder in folders:
            monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*folders, os.environ["PYTHONPATH"]]))
        loader.reset()

    yield install
    loader.reset()
    for name in list(sys.modules):
        if name.startswith(("dbcap_good", "dbcap_broken", "dbcap_slow", "dbcap_acts")):
            del sys.modules[name]


@pytest.fixture
def acts(plugins, tmp_path) -> None:
    """A plugin with a command that ends in each of the ways a command can end."""
    info = tmp_path / "acts" / "dbcap_acts-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dbcap-acts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dbcap.commands]\nact = dbcap_acts:app\n")
    (tmp_path / "acts" / "dbcap_acts.py").write_text(
        textwrap.dedent(
            """
            import sys, time
            from pathlib import Path

            import typer

            from dbcap.errors import InputError

            app = typer.Typer()

            @app.command()
            def act(how: str):
                if how == "value": return "a value that is no exit code"
                if how == "true": return True
                if how == "exit": raise typer.Exit(3)
                if how == "leave": sys.exit("left\\nearly")
                if how == "code": sys.exit(4)
                if how == "abort": raise typer.Abort()
                if how == "fault": raise ZeroDivisionError("by\\nzero")
                if how == "empty": raise ValueError
                if how == "input": raise InputError("bad input", "try another", kind="bad")
                if how == "usage": raise typer.BadParameter("not this one")
                if how == "file": open("/no/such\\nfile")
                if how == "print": print("\\n".join(map(str, range(100000))))
                if how == "wait":
                    Path("ready").touch()
                    time.sleep(30)
            """
        )
    )
    plugins(tmp_path / "acts")
