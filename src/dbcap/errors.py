"""One error tree: what went wrong, what to do next, and the exit code that tells a script.

All that a user can cause is a `DbcapError`; the CLI prints it in one line. Any other exception is a fault of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

OK = 0
FAILED = 1
USAGE = 2
PARTIAL = 3
LOCKED = 4
OUT_OF_TIME = 5
SIGINT = 130
SIGTERM = 143
SIGHUP = 129


class DbcapError(Exception):
    """Something failed. `message` says what and where, `hint` what to do next; both are parts of one line."""

    exit_code = FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(DbcapError):
    """The command line or the combination of settings cannot work."""

    exit_code = USAGE


class ConfigError(UsageError):
    """A configuration file, environment variable or option holds a wrong key or value."""


class LockHeldError(DbcapError):
    """Another process holds the lock."""

    exit_code = LOCKED


class ModelError(DbcapError):
    """A model cannot be found, fetched or loaded."""


class InputError(DbcapError):
    """One input cannot be used. `kind` is a stable word for scripts, for example `missing` or `truncated`."""

    def __init__(self, message: str, hint: str = "", *, kind: str) -> None:
        super().__init__(message, hint)
        self.kind = kind


class Interrupted(BaseException):
    """A signal asked us to stop. Like KeyboardInterrupt it is no Exception: `except Exception` must not swallow it."""

    def __init__(self, exit_code: int = SIGINT, state: str = "") -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code
        self.state = state
        """What is done, and what goes on from there."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean X?` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""
