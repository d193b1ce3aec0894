"""What signals do to a command: an exception ends it, wherever it is, but not in the middle of an import."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from dbcap.errors import SIGHUP, SIGINT, SIGTERM, Interrupted

PAUSE = 0.05
LONGEST_IMPORT = 10.0
"""Seconds after which a signal waits no longer."""
_IMPORTS = "<frozen importlib._bootstrap>"
_TIMER = hasattr(signal, "setitimer")
"""Windows has none; there, signals do not wait for imports."""


def take() -> None:
    """Let SIGTERM, SIGINT and SIGHUP end the command, unless the last two are ignored, as `nohup` and `&` have it."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _stop)


def _stop(number: int, frame: FrameType | None, since: float | None = None) -> None:
    """Raise what ends the command; while something is imported, later, unless a second signal comes.

    Libraries in C make nothing of an exception there: it is dropped, becomes another one, or ends the process.
    """
    is_second = since is None and _TIMER and signal.setitimer(signal.ITIMER_REAL, 0)[0] > 0
    since = time.monotonic() if since is None else since
    if _TIMER and not is_second and _in_import(frame) and time.monotonic() < since + LONGEST_IMPORT:
        _stop_later(number, since)
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise Interrupted(SIGTERM if number == signal.SIGTERM else SIGHUP)


def _in_import(frame: FrameType | None) -> bool:
    while frame and frame.f_code.co_filename != _IMPORTS:
        frame = frame.f_back
    return frame is not None


def _stop_later(number: int, since: float | None = None) -> None:
    if _TIMER:
        signal.signal(signal.SIGALRM, lambda _, frame: _stop(number, frame, since))
        signal.setitimer(signal.ITIMER_REAL, PAUSE)
    else:
        threading.Timer(PAUSE, _thread.interrupt_main, (number,)).start()


def send_again(lost: Any) -> None:
    """Send a signal again whose exception Python dropped, since it came while an object was taken apart.

    It is `sys.unraisablehook` of the command. Not at once: Python would drop it here too.
    """
    if not issubclass(lost.exc_type, KeyboardInterrupt | Interrupted):
        sys.__unraisablehook__(lost)
        return
    code = lost.exc_value.exit_code if isinstance(lost.exc_value, Interrupted) else SIGINT
    _stop_later(code - 128)
