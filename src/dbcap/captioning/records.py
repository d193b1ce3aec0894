r"""Writing captions: as lines of a file or of stdout, or beside each image.

Line text is UTF-8 whatever the locale; bytes of a file name that are no UTF-8 come out as they are. In JSON they are
written as `\udcXX`, the way Python reads them back.
"""

from __future__ import annotations

import io
import json
import math
import os
import posixpath
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Protocol

from dbcap.captioning.beside import (
    Existing,
    Placed,
    already_there,
    beside,
    collisions,
    combine,
    join,
    no_place,
    one_line,
    read_existing,
    refuse_collisions,
    replace,
)
from dbcap.errors import DbcapError, InputError, UsageError
from dbcap.images import is_picture_name
from dbcap.inputs import Source, shown
from dbcap.plugins.api import Record, Writer

__all__ = [
    "LINE_FORMATS",
    "Csv",
    "Existing",
    "Json",
    "JsonLines",
    "LineFormat",
    "Metadata",
    "MetadataFolder",
    "Placed",
    "Sidecar",
    "Text",
    "collisions",
    "json_bytes",
    "refuse_collisions",
]

_SURROGATE = re.compile("[\ud800-\udfff]")
_URL = re.compile(r"https?://", re.IGNORECASE)
_BOM = b"\xef\xbb\xbf"


# --- lines of one file ---------------------------------------------------------------------------------------------


class _Lines:
    """What the line formats share: nothing before the first row and nothing after the last."""

    def header(self) -> bytes:
        """Return what comes before the first row."""
        return b""

    def footer(self, empty: bool) -> bytes:  # noqa: ARG002 - the protocol
        """Return what comes after the last row."""
        return b""


class Text(_Lines):
    """`path<TAB>caption`, or the bare caption; one line for each candidate, best first, control characters escaped."""

    def __init__(self, with_path: bool) -> None:
        self._with_path = with_path

    def row(self, record: Record, first: bool) -> bytes:  # noqa: ARG002 - the protocol
        """Return the lines of one image."""
        start = shown(record.path) + "\t" if self._with_path else ""
        return _encode("".join(f"{start}{shown(candidate.text)}\n" for candidate in record.captions))


class Csv(_Lines):
    """Path and caption as RFC 4180 has it, but with newline line ends; a header line; one row for each candidate."""

    def header(self) -> bytes:
        """Return the names of the columns."""
        return b"path,caption\n"

    def row(self, record: Record, first: bool) -> bytes:  # noqa: ARG002 - the protocol
        """Return the rows of one image."""
        start = _csv_field(record.path)
        return _encode("".join(f"{start},{_csv_field(candidate.text)}\n" for candidate in record.captions))


class JsonLines(_Lines):
    """One JSON object a line."""

    def row(self, record: Record, first: bool) -> bytes:  # noqa: ARG002 - the protocol
        """Return the line of one image."""
        return json_bytes(_as_object(record)) + b"\n"


class Json:
    """One JSON array, an object a line. The comma leads, so that every row is a complete line by itself."""

    def header(self) -> bytes:
        """Open the array."""
        return b"[\n"

    def row(self, record: Record, first: bool) -> bytes:
        """Return the line of one image."""
        return (b" " if first else b",") + json_bytes(_as_object(record)) + b"\n"

    def footer(self, empty: bool) -> bytes:  # noqa: ARG002 - the protocol
        """Close the array."""
        return b"]\n"


class Metadata(_Lines):
    """Hugging Face imagefolder rows, with `file_name` relative to the folder `base`; `texts` too for candidates."""

    def __init__(self, base: Path) -> None:
        self._base = os.path.abspath(base)
        self._others = b""

    def keep(self, path: Path, sources: Iterable[Source]) -> None:
        """Keep the rows of other images in a table that is to be replaced. Raises `DbcapError` for a broken row."""
        self._others = _Table(path).without({posixpath.normpath(self._name(source.name)) for source in sources})

    def header(self) -> bytes:
        """Return the rows of other images."""
        return self._others

    def row(self, record: Record, first: bool) -> bytes:  # noqa: ARG002 - the protocol
        """Return the line of one image."""
        return json_bytes({"file_name": self._name(record.path)} | _texts(record)) + b"\n"

    def _name(self, path: str) -> str:
        return path if _URL.match(path) else os.path.relpath(path, self._base).replace(os.sep, "/")


class LineFormat(Protocol):
    """Makes the writer of a line format."""

    def __call__(self, *, with_path: bool, base: Path) -> Writer:
        """`with_path`: `text` names the image. `base`: the folder that the names in `metadata` are relative to."""


def _plain(make: Callable[[], Writer]) -> LineFormat:
    """Wrap a writer that needs nothing to know."""
    return lambda *, with_path, base: make()  # noqa: ARG005 - the protocol


LINE_FORMATS: dict[str, LineFormat] = {
    "text": lambda *, with_path, base: Text(with_path),  # noqa: ARG005 - the protocol
    "tsv": _plain(lambda: Text(with_path=True)),
    "json": _plain(Json),
    "jsonl": _plain(JsonLines),
    "csv": _plain(Csv),
    "metadata": lambda *, with_path, base: Metadata(base),  # noqa: ARG005 - the protocol
}
"""The formats that are lines of one file, by name."""


def json_bytes(value: Any) -> bytes:
    r"""Return JSON in UTF-8 on one line. Lone surrogates, which UTF-8 cannot hold, become the six characters \udcXX."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text).encode()


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _csv_field(text: str) -> str:
    """Quote a field where needed. Written out because the csv module of 3.11 leaves a lone carriage return bare."""
    return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text


def _score(score: float) -> float | None:
    """Return a score to 3 decimals, never -0.0, and None for what JSON has no number for."""
    return round(score, 3) + 0.0 if math.isfinite(score) else None


def _as_object(record: Record) -> dict[str, Any]:
    return {
        "path": record.path,
        "sha256": record.sha256,
        "width": record.width,
        "height": record.height,
        "caption": record.caption,
        "captions": [{"text": candidate.text, "score": _score(candidate.score)} for candidate in record.captions],
        "model": record.model,
        "seed": record.seed,
    }


def _texts(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {"text": record.caption}
    if len(record.captions) > 1:
        row["texts"] = [candidate.text for candidate in record.captions]
    return row


# --- beside each image ---------------------------------------------------------------------------------------------


class Sidecar:
    """A text file beside the image, `a.jpg` -> `a.txt`: one line for each candidate, best first.

    Appending and prepending put the new caption on the line of the old one, with ", " between; where either of them has
    several lines, each of which is a caption, the new ones become lines of their own after or before the old.
    """

    def __init__(self, extension: str = ".txt") -> None:
        extension = "." + extension.removeprefix(".")
        if extension in (".", "..") or "/" in extension or os.sep in extension or "\0" in extension:
            raise UsageError(f"{shown(extension)} is no file extension", "give one such as .txt or .caption")
        if is_picture_name("x" + extension):
            raise UsageError(f"{extension} is an extension of images", "give one such as .txt or .caption")
        self._extension = extension

    def target(self, source: Source) -> Path:
        """Return the path of the text file."""
        return beside(source, self._extension)

    def check(self, sources: Iterable[Source]) -> None:
        """Refuse URLs and two images with the same sidecar."""
        refuse_collisions(sources, self)

    def has(self, source: Source) -> bool:
        """Return whether there is a text file with something other than white space in it."""
        return bool(read_existing(self.target(source)).strip())

    def write(self, source: Source, record: Record, existing: Existing) -> None:
        """Write the text file. Raises `InputError` for a target that is no text: it may be anything, even an image."""
        target = self.target(source)
        lines = [one_line(candidate.text) for candidate in record.captions]
        data = read_existing(target).strip()
        if data and existing != "skip":
            old = _text_lines(target, data)
            if existing == "error":
                raise already_there(target)
            single = max(len(old), len(lines)) == 1
            lines = combine(old, lines, existing)
            if single:
                lines = [join(*lines)]
        if not data or existing != "skip":
            replace(target, _encode("".join(line + "\n" for line in lines)))

    def flush(self) -> None:
        """Do nothing: every caption is on disk as soon as it is written."""


class MetadataFolder:
    """A row in the `metadata.jsonl` of the folder that was given (for a file named by itself: of its own folder).

    Rows of other images, and what else stands in a row, are kept. A row without a `text` counts as no caption and is
    completed. All of the table is held in memory, and written by `flush` only.
    """

    def __init__(self) -> None:
        self._tables: dict[str, _Table] = {}

    def target(self, source: Source) -> Path:
        """Return the path of the metadata.jsonl."""
        if source.is_url:
            raise no_place(source)
        return Path(source.root or os.path.dirname(source.name), "metadata.jsonl")

    def check(self, sources: Iterable[Source]) -> None:
        """Refuse URLs, and read every table: `DbcapError` names the file and line of what is no JSON object."""
        for source in sources:
            if source.error is None:
                self._table(source)

    def has(self, source: Source) -> bool:
        """Return whether the image has a row with a text."""
        table, name = self._table(source), _file_name(source)
        return any(table.row(number).get("text") for number in table.numbers.get(name, ()))

    def write(self, source: Source, record: Record, existing: Existing) -> None:
        """Replace the image's row in its place, or add one at the end."""
        table, name = self._table(source), _file_name(source)
        if self.has(source) and existing == "skip":
            return
        if self.has(source) and existing == "error":
            raise already_there(self.target(source))
        for number in table.numbers.get(name, ()):
            table.put(number, _merged(table.row(number), record, existing))
        if name not in table.numbers:
            table.add(name, {"file_name": name} | _texts(record))

    def flush(self) -> None:
        """Write the tables that changed."""
        for table in self._tables.values():
            table.flush()

    def _table(self, source: Source) -> _Table:
        path = self.target(source)
        name = str(path)
        if name not in self._tables:
            real = os.path.realpath(path)  # one table for a folder with two names, or they would undo each other
            if real not in self._tables:
                self._tables[real] = _Table(path)
            self._tables[name] = self._tables[real]
        return self._tables[name]


class _Table:
    """The lines of a metadata.jsonl, and the numbers of those that belong to an image."""

    def __init__(self, path: Path) -> None:
        self.numbers: dict[str, tuple[int, ...]] = {}
        self._path = path
        self._lines = io.BytesIO(read_existing(path)).readlines()
        self._changed = False
        for number, line in enumerate(self._lines):
            name = self.row(number).get("file_name") if line.strip() else None
            if isinstance(name, str):
                name = posixpath.normpath(name)
                self.numbers[name] = (*self.numbers.get(name, ()), number)

    def without(self, names: Collection[str]) -> bytes:
        """Return the rows but for those of the images `names`."""
        mine = {number for name in names for number in self.numbers.get(name, ())}
        kept = [line.rstrip(b"\r\n") for number, line in enumerate(self._lines) if number not in mine]
        return b"".join(line + b"\n" for line in kept if line.strip())

    def row(self, number: int) -> dict[str, Any]:
        try:
            row = json.loads(self._lines[number].removeprefix(_BOM))
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DbcapError(
                f"{shown(str(self._path))}, line {number + 1}: no JSON object", "repair or remove that line"
            )
        return row

    def put(self, number: int, row: dict[str, Any]) -> None:
        line = self._lines[number]
        mark, end = (_BOM if line.startswith(_BOM) else b""), (b"\r\n" if line.endswith(b"\r\n") else b"\n")
        self._lines[number] = mark + json_bytes(row) + end
        self._changed = True

    def add(self, name: str, row: dict[str, Any]) -> None:
        if self._lines and not self._lines[-1].endswith(b"\n"):
            self._lines[-1] += b"\n"
        self.numbers[name] = (len(self._lines),)
        self._lines.append(json_bytes(row) + b"\n")
        self._changed = True

    def flush(self) -> None:
        if self._changed:
            replace(self._path, b"".join(self._lines))
            self._changed = False


def _file_name(source: Source) -> str:
    """Return the image's name in the table: relative to its folder, with forward slashes."""
    name = source.name[len(source.root) :].lstrip(os.sep) if source.root else os.path.basename(source.name)
    return posixpath.normpath(name.replace(os.sep, "/"))


def _merged(row: dict[str, Any], record: Record, existing: Existing) -> dict[str, Any]:
    """Return a row with the record's captions in place of its own, or joined with them; stale `texts` go."""
    new = _texts(record)
    old = row.get("text")
    if old and existing in ("append", "prepend"):
        listed = row.get("texts", [old])
        if not isinstance(old, str) or not isinstance(listed, list):
            raise InputError(f"the text of {shown(record.path)} in metadata.jsonl is no text", kind="metadata")
        if "texts" in row or "texts" in new:
            new["texts"] = combine(listed, new.get("texts", [new["text"]]), existing)
        new["text"] = join(*combine([old], [new["text"]], existing))
    return {key: value for key, value in row.items() if key != "texts" or key in new} | new


def _text_lines(path: Path, data: bytes) -> list[str]:
    """Return the lines of a text file, UTF-8 or UTF-16, without a byte order mark."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        data = data.decode("utf-16", "replace").encode("utf-8", "replace").strip()
    if b"\0" in data:
        raise InputError(f"{shown(str(path))} is no text file", "move it out of the way", kind="unwritable")
    text = data.removeprefix(_BOM).decode("utf-8", "surrogateescape")
    return [line.removesuffix("\r") for line in text.split("\n")]
