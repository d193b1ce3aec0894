"""What the tests of models share."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest


class Heard:
    """Events that remember what they were told."""

    def __init__(self):
        self.said, self.warned, self.details, self.tracks = [], [], [], []

    def say(self, message):
        self.said.append(message)

    def warn(self, message):
        self.warned.append(message)

    def fail(self, message):
        raise AssertionError(message)

    def detail(self, message):
        self.details.append(message)

    @contextlib.contextmanager
    def track(self, title, total, unit="images"):
        track = Track(title, total, unit)
        self.tracks.append(track)
        yield track


class Track:
    def __init__(self, title, total, unit):
        self.title, self.total, self.unit, self.done = title, total, unit, 0

    def advance(self, count=1):
        assert count > 0
        self.done += count

    def fail(self, count=1):
        raise AssertionError(count)


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def child():
    """Start Python children with a program and arguments; what is left of them is killed at the end."""
    with contextlib.ExitStack() as stack:

        def start(program, *arguments):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", program, *map(str, arguments)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process

        yield start
