"""What the core tells whoever runs it: the CLI renders it with rich, a library user may pass `Silent`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Tracker(Protocol):
    """Progress of one piece of long work."""

    def advance(self, count: int = 1) -> None:
        """Report `count` more units as done."""

    def fail(self, count: int = 1) -> None:
        """Report `count` units as failed; they count as done too."""

    def note(self, words: str) -> None:
        """Show a few words beside the progress."""


class Events(Protocol):
    """The progress protocol. Messages are single lines without markup."""

    def say(self, message: str) -> None:
        """Tell the user something worth knowing (silenced by --quiet)."""

    def warn(self, message: str) -> None:
        """Tell the user about something doubtful (silenced by --quiet)."""

    def fail(self, message: str) -> None:
        """Tell the user that one input failed; the work goes on."""

    def detail(self, message: str) -> None:
        """Explain a choice (shown with --verbose)."""

    def track(self, title: str, total: int | None, unit: str = "images") -> AbstractContextManager[Tracker]:
        """Open a progress display: `with events.track("Captioning", 40) as tracker`. `unit="bytes"` shows sizes."""


class _NoTracker:
    def advance(self, count: int = 1) -> None:
        pass

    def fail(self, count: int = 1) -> None:
        pass

    def note(self, words: str) -> None:
        pass


class Silent:
    """Events that nobody hears."""

    def say(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass

    def fail(self, message: str) -> None:
        pass

    def detail(self, message: str) -> None:
        pass

    @contextmanager
    def track(self, title: str, total: int | None, unit: str = "images") -> Iterator[Tracker]:  # noqa: ARG002
        yield _NoTracker()
