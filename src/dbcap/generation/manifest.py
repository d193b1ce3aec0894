"""`jobs.jsonl` in an output folder: a line for each image that was made. It tells what need not be made again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dbcap.errors import DbcapError
from dbcap.files import sync_folder
from dbcap.generation import pictures
from dbcap.inputs import shown

NAME = "jobs.jsonl"
_SUFFIXES = {*pictures.ENDINGS.values(), ".jpeg"}


class Manifest:
    """The images in a folder, by their job's key. Raises DbcapError for a folder that cannot be read."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._folder = folder
        self._names: dict[str, list[str]] = {}
        """Of each key, the last one being the newest."""
        self._key_of: dict[str, str] = {}
        """Of each name: one that was deleted may have been given to another job since."""
        self._whole = True
        try:
            self._read()
        except OSError as error:
            raise DbcapError(
                f"cannot read {shown(str(error.filename or folder))}: {error.strerror or error}",
                "check its access rights",
            ) from error

    def find(self, key: str) -> Path | None:
        """Return the image of a job, if it is there and is not, by what it says itself, another's."""
        for name in reversed(self._names.get(key, ())):
            path = self._folder / name
            if self._key_of[name] == key and pictures.whole(path):
                facts = pictures.facts_of(path)
                if facts is None or facts["key"] == key:  # without facts: somebody took them out
                    return path
        return None

    def taken(self, name: str) -> bool:
        """Return whether a file name is in use."""
        return os.path.lexists(self._folder / name)

    def add(self, key: str, name: str, facts: dict[str, Any]) -> None:
        """Write the line of an image that is in its place. Raises OSError."""
        created = not self._path.exists()
        line = json.dumps({"key": key, "file": name, **facts}, ensure_ascii=False) + "\n"
        with self._path.open("ab") as file:
            start, self._whole = "" if self._whole else "\n", False
            file.write((start + line).encode("utf-8", "backslashreplace"))  # half a character: JSON's own \udXXX
            file.flush()
            os.fsync(file.fileno())
        self._whole = True
        self._remember(key, name)
        if created:
            sync_folder(self._folder)

    def _read(self) -> None:
        """Take the lines, and of images that no line names what they say themselves: they were moved here, perhaps."""
        data = self._path.read_bytes() if self._path.is_file() else b""
        self._whole = not data or data.endswith(b"\n")
        for line in data.splitlines():
            try:
                entry = json.loads(line)
                key, name = entry["key"], entry["file"]
            except (ValueError, LookupError, TypeError, RecursionError):  # a line that was cut short, or not ours
                continue
            if isinstance(key, str) and isinstance(name, str) and os.path.basename(name) == name:
                self._remember(key, name)
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else ():
            if path.suffix.lower() in _SUFFIXES and path.name not in self._key_of and pictures.whole(path):
                facts = pictures.facts_of(path)
                if facts:
                    self._key_of[path.name] = facts["key"]
                    self._names.setdefault(facts["key"], []).insert(0, path.name)

    def _remember(self, key: str, name: str) -> None:
        self._key_of[name] = key
        self._names.setdefault(key, []).append(name)
