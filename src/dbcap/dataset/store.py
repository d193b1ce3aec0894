"""The folder of a data set: whether it may be one, what it held before, and replacing that whole.

OUT/dataset.json, OUT/train/*.png and OUT/train/metadata.jsonl (the layout of Hugging Face's imagefolder). A new state
is written as OUT/.dataset.json.next first, and takes the name dataset.json when all that it names is in its place. So
a run that was killed half way can be told from captions that somebody changed, and simply be run again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dbcap.dataset import manifest
from dbcap.dataset.captions import LINE_END, TABLE, one_line, row_of, text_of
from dbcap.dataset.manifest import FOLDER, NAME, DataSet, Photo
from dbcap.errors import DbcapError, UsageError
from dbcap.events import Events
from dbcap.files import sync_folder, write_atomic
from dbcap.inputs import shown
from dbcap.pixels import HOSTILE

LOCK = ".dbcap.lock"
NEXT = ".dataset.json.next"
_MARK = "dbcap"
"""The text in a PNG that holds the hash of its pixels: one that was changed since has another."""
_STRANGE = re.compile(r"[^\w .()+-]")
_LONGEST_STEM = 100


# ---- whether it may be one


def refuse(out: Path, folders: Iterable[str], files: Iterable[str]) -> None:
    """Raise UsageError for an --out that holds something else, or has to do with where photos come from."""
    name, real = shown(str(out)), Path(os.path.realpath(out))
    if os.path.lexists(out) and not out.is_dir():
        raise UsageError(f"--out {name} is no folder", "choose another")
    for folder in map(os.path.realpath, folders):
        if real.is_relative_to(folder) or Path(folder).is_relative_to(real):
            how = "is" if str(real) == folder else "lies inside" if real.is_relative_to(folder) else "holds"
            raise UsageError(f"--out {name} {how} the folder of photos {shown(folder)}", "choose one beside it")
    for file in files:
        if Path(os.path.realpath(file)).is_relative_to(real):
            raise UsageError(f"--out {name} holds the photo {shown(file)}", "choose another")
    names = set(os.listdir(out)) - {LOCK} if out.is_dir() else set()
    if names and not names & {NAME, NEXT}:
        raise UsageError(f"--out {name} is not empty, and no data set of dbcap's", "choose another, or empty it")


# ---- what it held before


@dataclass(frozen=True)
class Earlier:
    """What a data set held before, also in a state that was not finished."""

    photos: Mapping[str, Photo] = field(default_factory=dict)
    """By the name of their file."""
    edited: Mapping[str, str] = field(default_factory=dict)
    """Captions that were changed in the data set itself, by the name of the file."""
    rows: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Of its metadata.jsonl: what others put there besides is kept."""
    names: Collection[str] = ()
    """Of all files in its folder, the user's own among them."""

    def of(self, origin: str, sha256: str, present: Collection[str]) -> Photo | None:
        """Return what a photo was made into: by its path, or, where it was moved, by its content.

        `present` are the paths of all photos that there are now.
        """
        by_path = next((one for one in self.photos.values() if one.origin == origin), None)
        moved = (one for one in self.photos.values() if one.origin_sha256 == sha256 and one.origin not in present)
        return by_path or next(moved, None)


def earlier(out: Path, events: Events) -> Earlier:
    """Read what is there. Raises DbcapError, naming file and line, for what is damaged: nothing of it must be lost."""
    states = [manifest.read(out, name) for name in (NAME, NEXT) if (out / name).is_file()]
    photos: dict[str, Photo] = {}
    known: dict[str, set[str]] = {}
    for photo in (photo for state in states for photo in state.photos):
        photos[photo.file] = photo
        known.setdefault(photo.file, set()).add(photo.caption)
    rows = _rows(out / FOLDER / TABLE, events) if states else {}
    edited = {}
    for file, photo in photos.items():
        text = one_line(rows.get(file, {}).get("text") or "")
        if text and (photo.edited or text not in known[file]):
            edited[file] = text
    names = os.listdir(out / FOLDER) if (out / FOLDER).is_dir() else []
    return Earlier(photos, edited, rows, names)


def _rows(path: Path, events: Events) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(LINE_END.split(text_of(path.read_bytes(), str(path), events)), 1):
        row = row_of(line) if line.strip() else {}
        if row is None:
            raise DbcapError(
                f"{shown(str(path))}, line {number}: no row of file_name and text", "repair or remove that line"
            )
        if row:
            found[row["file_name"]] = row
    return found


def edited_picture(path: Path) -> Image.Image | None:
    """Return a prepared photo as it is now, if somebody changed its pixels; None also for one that cannot be read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = image.convert("RGB")
            return pixels if image.info.get(_MARK) != _digest(pixels) else None
    except HOSTILE:
        return None


def png_of(image: Image.Image) -> bytes:
    """Return an RGB picture as a PNG file that says what its pixels were."""
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text(_MARK, _digest(image))
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def free_name(origin: str, taken: Iterable[str]) -> str:
    """Return a file name after a photo's that no other has, whatever the case."""
    stem = _STRANGE.sub("-", os.path.splitext(os.path.basename(origin))[0]).strip(" .-")
    stem = stem.encode()[:_LONGEST_STEM].decode("utf-8", "ignore") or "photo"
    used = {name.casefold() for name in taken}
    name, number = f"{stem}.png", 1
    while name.casefold() in used:
        number += 1
        name = f"{stem}-{number}.png"
    return name


# ---- replacing it


def commit(data: DataSet, pictures: Mapping[str, bytes], before: Earlier) -> tuple[int, int]:
    """Make the folder hold this data set; `pictures` are the files to be there, but for those that stay as they are.

    Returns how many pictures were written, and how many removed. What is as it should be is not touched.
    """
    data.write(NEXT)
    folder = data.folder / FOLDER
    written = sum(put(folder / file, content) for file, content in pictures.items())
    rows = [{**before.rows.get(one.file, {}), "file_name": one.file, "text": one.caption} for one in data.photos]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    put(folder / TABLE, lines.encode("utf-8", "backslashreplace"))
    gone = [folder / file for file in before.photos if file not in {one.file for one in data.photos}]
    there = [path for path in gone if path.is_file()]
    for path in there:
        path.unlink()
    os.replace(data.folder / NEXT, data.folder / NAME)
    sync_folder(data.folder)
    return written, len(there)


def put(path: Path, content: bytes) -> bool:
    """Write a file unless it holds just that; returns whether it did not."""
    if path.is_file() and path.read_bytes() == content:
        return False
    write_atomic(path, content)
    return True
