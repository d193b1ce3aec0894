"""A lock that is waited for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from dbcap.errors import LockHeldError
from dbcap.events import Events
from dbcap.files import Lock


@contextlib.contextmanager
def waiting_lock(path: Path, events: Events, message: str) -> Iterator[None]:
    """Hold the lock on `path`, waiting for as long as somebody else does; `message` is said once if so."""
    lock = Lock(path)
    waited = False
    while True:
        try:
            lock.__enter__()
        except LockHeldError:
            if not waited:
                events.say(message)
            waited = True
            time.sleep(0.2)
        else:
            break
    try:
        yield
    finally:
        lock.__exit__()
