"""What an export wrote."""

from __future__ import annotations

from dataclasses import dataclass

from dbcap.exporting.quantise import Share


@dataclass(frozen=True)
class Written:
    """A file with a graph."""

    name: str
    """Inside the folder."""
    variant: str
    share: Share | None = None
    """How much of it was quantised, where that was asked for."""
