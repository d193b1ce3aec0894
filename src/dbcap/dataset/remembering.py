"""Events whose warnings are kept, to stand in the data set as well."""

from __future__ import annotations

from contextlib import AbstractContextManager

from dbcap.events import Events, Tracker


class Remembering:
    """Events that go on to others."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self.warnings: list[str] = []

    def say(self, message: str) -> None:
        self._events.say(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self._events.warn(message)

    def fail(self, message: str) -> None:
        self._events.fail(message)

    def detail(self, message: str) -> None:
        self._events.detail(message)

    def track(self, title: str, total: int | None, unit: str = "images") -> AbstractContextManager[Tracker]:
        return self._events.track(title, total, unit)
