"""Signals while a model trains: the first one asks for an end after this step, the second one ends at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from dbcap.errors import SIGHUP, SIGINT, SIGTERM, Interrupted

_CODES: dict[Any, int] = {signal.SIGINT: SIGINT, signal.SIGTERM: SIGTERM}
if hasattr(signal, "SIGHUP"):  # the terminal is gone; Windows has it not
    _CODES[signal.SIGHUP] = SIGHUP


class StoppedError(Exception):
    """A run ends before its last step; what is done is kept."""

    def __init__(self, exit_code: int | None) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code
        """Of the signal; None when time is over."""


class Signals:
    """What was asked for since training began."""

    def __init__(self) -> None:
        self.exit_code: int | None = None
        """Of the signal that asks for an end."""
        self.checkpoint = False
        """Whether SIGUSR1 asked for a checkpoint."""

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Note wishes for a checkpoint: before there is anything to write, they would end the process."""
        with _given_back(self._wishes()):
            for number in self._wishes():
                signal.signal(number, self._wish)
            yield

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals; afterwards whoever took them before does again."""
        with _given_back((*_CODES, *self._wishes())):
            self.listen()
            yield

    def listen(self) -> None:
        """Take signals, from Lightning too, which takes some when a fit begins."""
        for number, code in _CODES.items():
            if code != SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup` has it ignored
                signal.signal(number, self._end)
        for number in self._wishes():
            signal.signal(number, self._wish)

    @staticmethod
    def _wishes() -> tuple[Any, ...]:
        return (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()  # Windows has it not

    def _end(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the system's signature
        code = _CODES[signal.Signals(number)]
        if self.exit_code is not None:
            raise Interrupted(code)
        self.exit_code = code

    def _wish(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.checkpoint = True


def wait_for_training() -> None:
    """Let a wish for a checkpoint pass until there is somebody to take it: it would end the process."""
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@contextlib.contextmanager
def _given_back(numbers: Iterable[Any]) -> Iterator[None]:
    """In the end, give signals back to whoever took them before."""
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
