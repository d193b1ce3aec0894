"""A folder that appears whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dbcap.errors import UsageError
from dbcap.files import lock_beside, sync_folder, sync_tree
from dbcap.inputs import shown

MANIFEST = "export.json"


def refuse(out: Path, force: bool) -> None:
    """Raise UsageError where a folder cannot be written to this place: --force replaces exports and empty folders."""
    name = shown(str(out))
    if not os.path.lexists(out):
        return
    if not force:
        raise UsageError(f"{name} is there already", "choose another --out, or replace an export with --force")
    if not out.is_dir() or out.is_symlink():
        raise UsageError(f"{name} is no folder, and --force replaces only exports", "choose another --out")
    if os.listdir(out) and not (out / MANIFEST).is_file():
        raise UsageError(f"{name} holds something else than an export: it has no {MANIFEST}", "choose another --out")


@contextlib.contextmanager
def whole_folder(out: Path, force: bool) -> Iterator[Path]:
    """Give a temporary folder that takes the name `out` when the block ends well, and vanishes when it does not.

    Raises UsageError for a place that is taken, LockHeldError where another export writes to it.
    """
    out = Path(os.path.abspath(out))
    refuse(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {shown(str(out.parent))}: {error.strerror}", "choose another --out") from error
    with lock_beside(out):
        start = f".{out.name}."
        for left in out.parent.glob(f"{start}*.tmp"):  # of an export that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=start, suffix=".tmp", dir=out.parent) as name:
            made = Path(name) / out.name
            made.mkdir()
            yield made
            sync_tree(made)
            refuse(out, force)
            if out.is_dir():
                out.rename(Path(name) / "before")
            made.rename(out)
            sync_folder(out.parent)
