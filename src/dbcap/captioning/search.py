"""The search for captions."""

from __future__ import annotations

from typing import NamedTuple


class Found(NamedTuple):
    """One caption as tokens, from the start token to the end token, and its score."""

    tokens: tuple[int, ...]
    score: float
