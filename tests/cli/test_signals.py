"""Signals end a command wherever it is, in one line, but for what is being imported."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

ENDS = [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "the terminal was closed")]


def ended(project, module, work="time.sleep(20)", before=""):
    """Run a command that imports a module of these lines before its `work`."""
    (project / "module.py").write_text(f"import os, time\n{module}\n")
    script = f"""
import sys, time
from dbcap.__main__ import main
from dbcap.cli import command, signals
sys.path.insert(0, ".")
{before}
def resolve(_):
    import module
    {work}
command.resolve = resolve
sys.argv[1:] = ["config", "show"]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("number", "words"), ENDS)
def test_an_import_is_ended_before_the_command(project, number, words):
    module = f"os.kill(os.getpid(), {int(number)})\nfor _ in range(20):\n    time.sleep(0.01)\nprint('imported')"
    assert ended(project, module) == (128 + number, "imported\n", f"error: {words}\n")


def test_one_that_takes_too_long_is_left(project):
    module = f"os.kill(os.getpid(), {int(signal.SIGINT)})\ntime.sleep(20)"
    assert ended(project, module, before="signals.LONGEST_IMPORT = 0.2") == (130, "", "error: interrupted\n")


def test_a_second_one_does_not_wait(project):
    module = f"os.kill(os.getpid(), {int(signal.SIGTERM)})\nos.kill(os.getpid(), {int(signal.SIGINT)})\ntime.sleep(20)"
    assert ended(project, module, before="signals.LONGEST_IMPORT = 60") == (130, "", "error: interrupted\n")


@pytest.mark.parametrize(("number", "words"), ENDS)
def test_what_is_dropped_as_an_object_is_taken_apart_comes_again(project, number, words):
    module = f"""
class Last:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})
        time.sleep(0.1)"""
    found = ended(project, module, "last = module.Last(); del last; time.sleep(20)")
    assert found == (128 + number, "", f"error: {words}\n")


def test_what_is_ignored_stays_ignored(project):
    module = f"os.kill(os.getpid(), {int(signal.SIGINT)})\nos.kill(os.getpid(), {int(signal.SIGHUP)})"
    before = "import signal\nfor one in (signal.SIGINT, signal.SIGHUP): signal.signal(one, signal.SIG_IGN)"
    assert ended(project, module, "print('done'); sys.exit(7)", before)[:2] == (7, "done\n")
