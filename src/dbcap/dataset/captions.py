"""Captions that are there already, beside photos, and those that a captioner gives."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbcap.config.base import CommonConfig
from dbcap.config.paths import cache_dir
from dbcap.config.training import PreparingConfig
from dbcap.events import Events
from dbcap.inputs import shown
from dbcap.models import hub

BESIDE = (".txt", ".caption")
TABLE = "metadata.jsonl"
LINE_END = re.compile(r"\r\n|\r|\n")  # not str.splitlines: JSON may hold what else it takes for a line end
_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def text_of(data: bytes, name: str, events: Events) -> str:
    """Decode a text file, without a byte order mark; warns of what is no UTF-8 and so may be read wrongly."""
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")
    if encoding == "utf-16":
        events.warn(f"{shown(name)} is in UTF-16: save it as UTF-8")
        return data.decode(encoding, "replace")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        pass
    for encoding in ("cp1252", "latin-1"):  # the latter takes every byte
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        break
    events.warn(f"{shown(name)} is no UTF-8: it was read as {encoding}")
    return text


def one_line(text: str) -> str:
    """Return a caption: its lines that are not blank, joined by a comma and a space."""
    return ", ".join(filter(None, (" ".join(line.split()) for line in LINE_END.split(text))))


class Written:
    """Captions that somebody wrote: in `NAME.txt` or `NAME.caption` beside a photo, or its folder's metadata.jsonl."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._tables: dict[Path, dict[str, str]] = {}

    def of(self, photo: Path) -> str:
        """Return a photo's caption, the first of these that is not empty; an empty one where there is none."""
        for path in (photo.with_suffix(ending) for ending in BESIDE):
            if path != photo and (caption := one_line(self._read(path))):
                return caption
        return self._table(photo.parent).get(photo.name, "")

    def _read(self, path: Path) -> str:
        try:
            data = path.read_bytes() if path.is_file() else b""
        except OSError as error:
            self._events.warn(f"cannot read {shown(str(path))}: {error.strerror}")
            return ""
        return text_of(data, str(path), self._events)

    def _table(self, folder: Path) -> dict[str, str]:
        if folder not in self._tables:
            path = folder / TABLE
            self._tables[folder] = {}
            for number, line in enumerate(LINE_END.split(self._read(path)), 1):
                if not line.strip():
                    continue
                row = row_of(line)
                if row is None:
                    self._events.warn(f"{shown(str(path))}, line {number}: no row of file_name and text; left out")
                    continue
                self._tables[folder][posixpath.normpath(row["file_name"])] = one_line(row.get("text") or "")
        return self._tables[folder]


def row_of(line: str) -> dict[str, Any] | None:
    """Return a line of a metadata.jsonl: `file_name` is a text, and `text` one, null or missing. None for others."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(row, dict) and isinstance(row.get("file_name"), str)
    return row if sound and isinstance(row.get("text"), str | None) else None


def described(photos: Sequence[str], config: PreparingConfig, common: CommonConfig, events: Events) -> list[str]:
    """Return what the captioner says of photos. Raises DbcapError where it cannot be loaded."""
    from dbcap.captioning.api import Captioner  # it imports torch

    asked: dict[str, Any] = {"offline": common.offline, "allow_pickle": common.allow_pickle}
    hub.locate(config.captioner, events=events, home=cache_dir(), **asked)  # what it fetches, it shows here
    captioner = Captioner.load(config.captioner, device=config.device, **asked)
    said = []
    with events.track("Captioning", len(photos)) as tracker:
        for caption in captioner.caption(iter(photos), max_pixels=config.max_pixels):
            said.append(one_line(caption.text))
            tracker.advance()
    return said
