"""What the shell offers after TAB. Only names are read: no setting is resolved and no plugin imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import typer

from dbcap import runs
from dbcap.config import profiles
from dbcap.config.fields import choices
from dbcap.config.layers import known_fields, normal_key


def one_of(words: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a completer of fixed words."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def key(incomplete: str) -> list[str]:
    """Offer keys of settings."""
    return one_of(known_fields())(incomplete)


def assignment(incomplete: str) -> list[str]:
    """Offer `KEY=`."""
    return [f"{name}=" for name in key(incomplete)]


def value(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the values of the key that stands before."""
    field = known_fields().get(normal_key(str(ctx.params.get("key"))))
    return one_of(choices(field))(incomplete) if field else []


def profile(incomplete: str) -> list[str]:
    """Offer the names of profiles."""
    return one_of(profiles.names())(incomplete)


def run(incomplete: str) -> list[str]:
    """Offer the names of runs."""
    return one_of(one.name for one in runs.every())(incomplete)
