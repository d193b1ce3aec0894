"""A folder or a file that appears whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dbcap.errors import UsageError
from dbcap.files import lock_beside, sync_folder, sync_tree
from dbcap.inputs import shown

MANIFEST = "export.json"
HEADER = "dbcap.export"
"""The key in a file's header that holds what the manifest is for a folder: a JSON object."""
ENDING = ".safetensors"


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


def file_for(out: str, name: str) -> Path:
    """Return the file that --out means: it ends in .safetensors, or it is a folder, for a file of that name."""
    return Path(out) if out.endswith(ENDING) and not os.path.isdir(out) else Path(out) / f"{name}{ENDING}"


def refuse_file(out: Path, force: bool) -> None:
    """Raise UsageError where a file cannot be written to this place: --force replaces only what export wrote."""
    if not os.path.lexists(out):
        return
    name = shown(str(out))
    if not force:
        raise UsageError(f"{name} is there already", "choose another --out, or replace an export with --force")
    if out.is_symlink() or not out.is_file() or HEADER not in _metadata(out):
        raise UsageError(f"{name} is no export, and --force replaces only exports", "choose another --out")


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


@contextlib.contextmanager
def whole_folder(out: Path, force: bool) -> Iterator[Path]:
    """Give a temporary folder that takes the name `out` when the block ends well, and vanishes when it does not.

    Raises UsageError for a place that is taken, LockHeldError where another export writes to it.
    """
    with _whole(out, force, refuse) as made:
        made.mkdir()
        yield made


@contextlib.contextmanager
def whole_file(out: Path, force: bool) -> Iterator[Path]:
    """Give the place of a temporary file, which becomes `out` as the folder of `whole_folder` does."""
    with _whole(out, force, refuse_file) as made:
        yield made


@contextlib.contextmanager
def _whole(out: Path, force: bool, refused: Callable[[Path, bool], None]) -> Iterator[Path]:
    out = Path(os.path.abspath(out))
    refused(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {shown(str(out.parent))}: {error.strerror}", "choose another --out") from error
    with lock_beside(out):
        start = f".{out.name}."
        for left in out.parent.glob(f"{glob.escape(start)}*.tmp"):  # of an export that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=start, suffix=".tmp", dir=out.parent) as name:
            made = Path(name) / out.name
            yield made
            sync_tree(Path(name))
            refused(out, force)
            if out.is_dir():
                out.rename(Path(name) / "before")
            made.rename(out)
            sync_folder(out.parent)
