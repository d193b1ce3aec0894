"""Every exception has its exit code and its one line."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys

import pytest
import typer

from dbcap import errors
from dbcap.cli.errors import explain, is_fault
from dbcap.errors import (
    ConfigError,
    DbcapError,
    InputError,
    Interrupted,
    LockHeldError,
    ModelError,
    UsageError,
)


class Recorder:
    """Stands for the terminal."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def error(self, message: str) -> None:
        self.lines.append(message)


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (DbcapError("what", "next"), 1, ["what; next"]),
        (DbcapError("what"), 1, ["what"]),
        (ModelError("what"), 1, ["what"]),
        (InputError("what", kind="x"), 1, ["what"]),
        (UsageError("what"), 2, ["what"]),
        (ConfigError("what"), 2, ["what"]),
        (LockHeldError("what"), 4, ["what"]),
        (OSError(errno.ENOSPC, "No space left", "run.json"), 1, ["run.json: No space left; make room there"]),
        (typer.Exit(), 0, []),
        (typer.Exit(3), 3, []),
        (SystemExit(), 0, []),
        (SystemExit(5), 5, []),
        (SystemExit("text"), 1, ["text"]),
        (typer.Abort(), 1, ["aborted"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (Interrupted(errors.SIGINT), 130, ["interrupted"]),
        (Interrupted(errors.SIGTERM), 143, ["terminated"]),
        (FileNotFoundError(2, "No such file or directory", "x"), 1, ["x: No such file or directory"]),
        (OSError(28, "No space left on device"), 1, ["No space left on device"]),
        (
            ValueError("odd"),
            1,
            ["ValueError: odd; this is a fault in dbcap, and DBCAP_DEBUG=1 shows where it happened"],
        ),
        (
            OSError("odd"),
            1,
            ["odd"],
        ),
    ],
)
def test_codes_and_lines(home, error, code, lines):
    terminal = Recorder()
    assert explain(error, terminal) == code
    assert terminal.lines == lines


@pytest.mark.parametrize("error", [DbcapError("what"), UsageError("what"), ValueError("x"), OSError(2, "x")])
def test_debug_lets_every_error_go_on(home, monkeypatch, error):
    monkeypatch.setenv("DBCAP_DEBUG", "1")
    with pytest.raises(type(error)):
        explain(error, Recorder())


def test_signals_and_ends_are_no_errors_even_then(home, monkeypatch):
    monkeypatch.setenv("DBCAP_DEBUG", "1")
    assert explain(KeyboardInterrupt(), Recorder()) == 130
    assert explain(typer.Exit(3), Recorder()) == 3


def test_what_is_no_exception_of_ours_or_pythons_goes_on(home):
    with pytest.raises(GeneratorExit):
        explain(GeneratorExit(), Recorder())


@pytest.mark.parametrize(
    ("error", "fault"),
    [(ValueError(), True), (MemoryError(), True), (DbcapError("x"), False), (OSError(), False), (typer.Exit(), False)],
)
def test_a_fault_is_what_nobody_foresaw(error, fault):
    assert is_fault(error) is fault


def test_a_fault_of_ours_is_one_line_in_a_real_process(project):
    script = """
import dbcap.config.store as store
def broken(*_): raise ZeroDivisionError("one\\nline")
store.set_value = broken
from dbcap.cli.app import run
raise SystemExit(run(["config", "set", "quiet", "true"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: ZeroDivisionError: one\\nline; this is a fault in dbcap, and DBCAP_DEBUG=1 shows where it happened\n"
    )


def test_a_signal_before_the_work_begins_is_one_line_too(project):
    script = "import os, signal\nfrom dbcap.cli import command\n"
    script += "command.resolve = lambda _: os.kill(os.getpid(), signal.SIGTERM)\n"
    script += "from dbcap.cli.app import run\nraise SystemExit(run(['config', 'show']))\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "error: terminated\n")
