"""What the formats that put a caption beside its image share: where it goes, what to do with an old one, writing it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from dbcap.errors import DbcapError, InputError, UsageError
from dbcap.files import write_atomic
from dbcap.inputs import Source, shown
from dbcap.plugins.api import Record

Existing = Literal["skip", "overwrite", "append", "prepend", "error"]
"""What to do where a caption is already there."""

_LINE_BREAKS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Placed(Protocol):
    """A format that puts the caption where the image is. Every method takes sources without an error."""

    def target(self, source: Source) -> Path:
        """Return the file that holds this image's caption. Raises `UsageError` for a URL, `InputError` if none can."""

    def check(self, sources: Iterable[Source]) -> None:
        """Refuse, before any work, what can never be written: `UsageError`, or `DbcapError` for a damaged file."""

    def has(self, source: Source) -> bool:
        """Return whether a caption is already there. Raises `InputError` if what is there cannot be understood."""

    def write(self, source: Source, record: Record, existing: Existing) -> None:
        """Write the caption; `existing` says what to do if `has`. Raises `InputError` if that is impossible."""

    def flush(self) -> None:
        """Put on disk what `write` has kept back."""


def beside(source: Source, extension: str) -> Path:
    """Return the image's path with its suffix replaced.

    Raises `UsageError` for a URL, and `InputError` for a file that has this very name: a caption must not replace it.
    """
    if source.is_url:
        raise no_place(source)
    path = os.path.splitext(source.name)[0] + extension
    if path == source.name:
        raise InputError(f"the caption of {shown(path)} would replace it", "leave it out", kind="unwritable")
    return Path(path)


def collisions(sources: Iterable[Source], placed: Placed) -> list[tuple[Source, Source]]:
    """Return the pairs of different images that would share one target file; for formats with a file for each image.

    The same image reached through two links to its folder is no collision.
    """
    folders: dict[str, str] = {}

    def real(path: str) -> str:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        return os.path.join(folders[folder], name)

    pairs = []
    owners: dict[str, Source] = {}
    for source in sources:
        if source.error is None:
            try:
                target = real(str(placed.target(source)))
            except InputError:  # it will fail by itself when its turn comes
                continue
            owner = owners.setdefault(target, source)
            if owner is not source and real(owner.name) != real(source.name):
                pairs.append((owner, source))
    return pairs


def refuse_collisions(sources: Iterable[Source], placed: Placed) -> None:
    """Raise `UsageError` for the first of the `collisions`."""
    pairs = collisions(sources, placed)
    if pairs:
        one, two = pairs[0]
        more = f", and there are {len(pairs) - 1} more such images" if len(pairs) > 1 else ""
        raise UsageError(
            f"{shown(one.name)} and {shown(two.name)} would share {shown(str(placed.target(two)))}{more}",
            "rename one, or choose another format",
        )


def read_existing(path: Path) -> bytes:
    """Return the content of a file, empty if there is none. Raises `InputError` if it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise InputError(
            f"cannot read {shown(str(path))}: {error.strerror}", "move it out of the way", kind="unwritable"
        ) from error


def replace(path: Path, data: bytes) -> None:
    """Write atomically. Raises `InputError` if this file cannot be written, `DbcapError` if no other could either."""
    try:
        write_atomic(path, data)
    except OSError as error:
        message = f"cannot write {shown(str(path))}: {error.strerror}"
        if error.errno in _FATAL:
            raise DbcapError(message, "make room there, then run the same command again") from error
        raise InputError(message, "check the permissions of the folder", kind="unwritable") from error


def already_there(path: Path) -> InputError:
    """Return the error for `--existing error`."""
    return InputError(
        f"{shown(str(path))} has a caption already",
        "choose --existing skip, overwrite, append or prepend",
        kind="exists",
    )


def join(first: str, second: str = "") -> str:
    """Join two captions into one line of text."""
    return ", ".join(filter(None, (first.strip(), second.strip())))


def one_line(text: str) -> str:
    """Return a caption with its line breaks made spaces."""
    return _LINE_BREAKS.sub(" ", text)


def combine(old: Sequence[str], new: Sequence[str], existing: Existing) -> list[str]:
    """Return old and new captions in the order that `existing` asks for; `overwrite` leaves the new ones."""
    return [*new, *old] if existing == "prepend" else [*old, *new] if existing == "append" else list(new)


def no_place(source: Source) -> UsageError:
    """Return the error for a URL."""
    return UsageError(
        f"nothing can be written beside {shown(source.name)}", "use a format such as jsonl for captions of URLs"
    )
