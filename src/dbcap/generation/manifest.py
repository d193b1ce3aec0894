"""`jobs.jsonl` in an output folder: a line for each image that was made. It tells what need not be made again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dbcap.files import sync_folder
from dbcap.generation import pictures

NAME = "jobs.jsonl"


class Manifest:
    """The images in a folder, by their job's key."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._folder = folder
        self._made: dict[str, str] = {}
        self._whole = True
        self._read()

    def find(self, key: str) -> Path | None:
        """Return the image of a job, if it is there."""
        name = self._made.get(key)
        path = self._folder / name if name else None
        return path if path and path.is_file() else None

    def taken(self, name: str) -> bool:
        """Return whether a file name is in use."""
        return os.path.lexists(self._folder / name)

    def add(self, key: str, name: str, facts: dict[str, Any]) -> None:
        """Write the line of an image that is in its place."""
        created = not self._path.exists()
        line = json.dumps({"key": key, "file": name, **facts}, ensure_ascii=False)
        with self._path.open("ab") as file:
            file.write((line if self._whole else f"\n{line}").encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._whole = True
        self._made[key] = name
        if created:
            sync_folder(self._folder)

    def _read(self) -> None:
        """Take the lines, and of images that no line names what they say themselves: they were moved here, perhaps."""
        named = set()
        data = self._path.read_bytes() if self._path.is_file() else b""
        self._whole = not data or data.endswith(b"\n")
        for line in data.splitlines():
            try:
                entry = json.loads(line)
                key, name = entry["key"], entry["file"]
            except (ValueError, KeyError, TypeError):  # the end of a line that was cut short, or not ours
                continue
            if isinstance(key, str) and isinstance(name, str) and "/" not in name:
                self._made[key] = name
                named.add(name)
        for path in sorted(self._folder.glob("*")) if self._folder.is_dir() else ():
            if path.suffix in pictures.ENDINGS.values() and path.name not in named and path.is_file():
                facts = pictures.facts_of(path)
                if facts and isinstance(facts["key"], str):
                    self._made.setdefault(facts["key"], path.name)
