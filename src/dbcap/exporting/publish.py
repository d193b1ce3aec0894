"""A folder or a file that appears whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dbcap.errors import DbcapError, UsageError
from dbcap.files import NO_ROOM, lock_beside, sync_folder, sync_tree
from dbcap.inputs import shown
from dbcap.models.exported import MANIFEST

CONTENTS = "contents"
"""The manifest's list of all files of the export, itself among them: what --force may remove."""
HEADER = "dbcap.export"
"""The key in a file's header that holds what the manifest is for a folder: a JSON object."""
ENDING = ".safetensors"
OTHER_ENDINGS = (".bin", ".ckpt", ".pt", ".pth")
"""Of files of weights in other formats."""
OTHERS = "choose another --out"


def refuse(out: Path, force: bool) -> None:
    """Raise UsageError where a folder cannot be written to this place: --force replaces exports and empty folders."""
    _refuse(out, force, _foreign)


def refuse_file(out: Path, force: bool) -> None:
    """Raise UsageError where a file cannot be written to this place: --force replaces only what export wrote."""
    _refuse(out, force, _no_export)


def _refuse(out: Path, force: bool, why_not: Callable[[Path], str]) -> None:
    name = shown(str(out))
    if not _is_utf8(out):
        raise UsageError(f"{name} is no UTF-8, and libraries take no other names", OTHERS)
    if not os.path.lexists(out):
        _refuse_parent(out)
    elif reason := why_not(out):
        raise UsageError(f"{name} {reason}", OTHERS)
    elif not force:
        raise UsageError(f"{name} is there already", f"{OTHERS}, or replace it with --force")


def _is_utf8(out: Path) -> bool:
    try:
        return bool(os.path.abspath(out).encode())
    except UnicodeEncodeError:
        return False


def _refuse_parent(out: Path) -> None:
    parent = next(one for one in out.absolute().parents if os.path.lexists(one))
    if not parent.is_dir():
        raise UsageError(f"{shown(str(out))} has no place: {shown(str(parent))} is no folder", OTHERS)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"nothing can be written to the folder {shown(str(parent))}", OTHERS)


def _foreign(out: Path) -> str:
    """Return why --force does not replace a folder, an empty text where it does."""
    if out.is_symlink() or not out.is_dir():
        return f"is {'a link' if out.is_symlink() else 'no folder'}, and --force replaces only exports"
    if Path.cwd().is_relative_to(out.resolve()):
        return "is the current folder or holds it"
    if not os.listdir(out):
        return ""
    told = contents(out)
    if not told:
        return f"holds something else than an export: it has no {MANIFEST} of dbcap's"
    other = sorted(set(files_in(out)) - set(told))
    return f"holds something else than an export: {other[0]}" if other else ""


def contents(folder: Path) -> list[str]:
    """Return what files an export has by its manifest; none where there is no manifest of dbcap's."""
    try:
        document: Any = json.loads((folder / MANIFEST).read_bytes())
        return list(document[CONTENTS])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def files_in(folder: Path) -> list[str]:
    """Return all that is no folder below a folder, by its path in it."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _no_export(out: Path) -> str:
    """Return why --force does not replace a file, an empty text where it does."""
    is_export = not out.is_symlink() and out.is_file() and HEADER in _metadata(out)
    return "" if is_export else "is no export, and --force replaces only exports"


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def file_for(out: str, name: str) -> Path:
    """Return the file that --out means: it ends in .safetensors, or it is a folder, for a file of that name.

    Raises UsageError where it ends as files of other formats do.
    """
    ending = Path(out).suffix.lower()
    if os.path.isdir(out) or ending not in (ENDING, *OTHER_ENDINGS):
        return Path(out) / f"{name}{ENDING}"
    if ending in OTHER_ENDINGS:
        raise UsageError(f"{shown(out)} ends in {ending}, and what is written is a {ENDING} file", OTHERS)
    return Path(out)


# ---- writing


@contextlib.contextmanager
def whole_folder(out: Path, force: bool) -> Iterator[Path]:
    """Give a temporary folder that takes the name `out` when the block ends well, and vanishes when it does not.

    Raises UsageError for a place that is taken, LockHeldError where another export writes to it, DbcapError where there
    is no room.
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
    with _no_room(out), _parents(out), lock_beside(out), _beside(out) as place:
        refused(out, force)
        made = place / out.name
        yield made
        sync_tree(place)
        refused(out, force)
        try:
            if out.is_dir():
                out.rename(_before(place, out))
            made.rename(out)
        except BaseException:
            _put_back(place, out)
            raise
        sync_folder(out.parent)


def _before(place: Path, out: Path) -> Path:
    """Return where what is replaced stands for a moment."""
    return place / f"{out.name}.before"


def _put_back(place: Path, out: Path) -> None:
    """Give what was to be replaced its name again, where nothing replaced it."""
    if _before(place, out).exists() and not os.path.lexists(out):
        _before(place, out).rename(out)


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """Make a hidden folder for as long as the block lasts. Its name is only for this `out`, whose lock is held."""
    place = out.with_name(f".{out.name}.export.tmp")
    _put_back(place, out)  # of an export that was killed
    shutil.rmtree(place, ignore_errors=True)
    try:
        place.mkdir()
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Make the folders that `out` needs; where the block fails, the new ones go again."""
    new = [one for one in out.parents if not one.exists()]
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make {shown(str(out.parent))}: {error.strerror}", OTHERS) from error
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # somebody else's file in it
            for one in new:
                one.rmdir()
        raise


@contextlib.contextmanager
def _no_room(out: Path) -> Iterator[None]:
    """Say of a full disk, in whatever way the system or a library does, what has no room."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        told = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number not in NO_ROOM:
            raise
        raise DbcapError(f"there is no room for {shown(str(out))}", f"make room, or {OTHERS}") from error
