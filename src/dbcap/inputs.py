"""What the arguments of a command name: files, folders, globs, lists and URLs, in the order given, each path once."""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dbcap.errors import InputError, UsageError
from dbcap.images import is_picture_name

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WEB = re.compile(r"https?://", re.IGNORECASE)
_MAGIC = re.compile(r"[*?\[]")
_BOM = b"\xef\xbb\xbf"
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROL |= {ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"}


@dataclass(frozen=True, slots=True)
class Source:
    """One input. `name` is what is shown and written; `root` the folder argument it came from.

    `name` is the path as the user gave it (for a file of a folder: that argument joined with the rest) or the URL.
    `root` is empty for what was named directly. An `error` marks an input that failed before it was opened.
    """

    name: str
    root: str = ""
    is_url: bool = False
    error: InputError | None = None


@dataclass(frozen=True)
class Found:
    """What `discover` found: the inputs in order, how many files in folders are no pictures, and what gave nothing.

    `single` says that there was exactly one argument and that it names one file or one URL; `empty` lists the folders
    and lists (`@FILE`, or `-`) without any input. Hidden files are not counted in `ignored`.
    """

    sources: list[Source]
    ignored: int
    single: bool
    empty: list[str]


def as_path(source: Source) -> Path:
    """Return the path of a source that is a file. Raises ValueError for a URL, which has none."""
    if source.is_url:
        raise ValueError(f"a URL has no path: {source.name}")
    return Path(source.name)


def shown(name: str) -> str:
    r"""Return `name` fit for one line of output: tab, newline and return as \t \n \r, other controls as \xNN.

    Surrogates, which stand for bytes that are not UTF-8, are kept: encode with `surrogateescape`.
    """
    return name.translate(_CONTROL)


def discover(
    arguments: Sequence[str], *, recursive: bool = False, null: bool = False, stdin: BinaryIO | None = None
) -> Found:
    """Find the inputs that `arguments` name.

    `-` is a list on stdin and `@FILE` a list in a file: one path or URL a line, or ended by NUL with `null`. What names
    something existing is that, whatever characters it holds; other arguments may be URLs and globs, list lines URLs.
    Folders give the pictures in them, with `recursive` those below too. What is missing or unreadable becomes a source
    with an error. Globs behave as in the shell: wildcards match no hidden names, and a folder in the way of a pattern
    that cannot be read holds no match.

    Raises `UsageError` for a list that cannot be read and for a second `-`.
    """
    if list(arguments).count("-") > 1:
        raise UsageError("- (a list on stdin) was given more than once", "give it once; ./- is a file of that name")
    search = _Search(recursive, null, stdin)
    names_one = [search.argument(argument) for argument in arguments]
    return Found(search.sources, search.ignored, names_one == [True], search.empty)


@dataclass(slots=True)
class _Open:
    """A folder being walked: its path, its key, what identifies it on disk, and what is left in it."""

    path: str
    key: str
    identity: tuple[int, int]
    rest: Iterator[tuple[str, str]]


class _Search:
    """The state of one `discover`: what was found so far and what was already seen."""

    def __init__(self, recursive: bool, null: bool, stdin: BinaryIO | None) -> None:
        self.sources: list[Source] = []
        self.ignored = 0
        self.empty: list[str] = []
        self._recursive = recursive
        self._null = null
        self._stdin = stdin
        self._seen: set[str] = set()
        self._entered: set[str] = set()

    def argument(self, argument: str) -> bool:
        """Take one argument. Returns whether it names one file or one URL."""
        if argument == "-":
            self._list("-", self._read_stdin())
            return False
        if argument.startswith("@") and not os.path.lexists(argument):
            self._list(argument, _read_list(argument[1:]))
            return False
        return self._name(argument, globs=True)

    def _name(self, name: str, *, globs: bool) -> bool:
        """Take one path or URL, or a glob if `globs`. Returns whether it names one file or one URL."""
        problem: OSError | ValueError
        try:
            mode = os.stat(name).st_mode
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            problem = error
        else:
            if stat.S_ISDIR(mode):
                self._folder(name)
                return False
            self._add(Source(name), _key(name))
            return True
        if os.path.lexists(name):
            self._add(Source(name, error=_broken(name)), _key(name))
        elif _WEB.match(name):
            self._add(Source(name, is_url=True), name)
        elif _SCHEME.match(name):
            self._add(Source(name, is_url=True, error=_other_scheme(name)), name)
        elif globs and _MAGIC.search(name):
            self._glob(name)
            return False
        else:
            self._add(Source(name, error=_unfound(name, problem)), _key(name))
        return True

    def _glob(self, pattern: str) -> None:
        matches = _matches(pattern)
        for match in matches:
            self._name(match, globs=False)
        if not matches:
            error = InputError(f"no file matches {shown(pattern)}", "check the pattern", kind="missing")
            self._add(Source(pattern, error=error), _key(pattern))

    def _list(self, label: str, data: bytes) -> None:
        lines = _split_list(label, data, self._null)
        for line in lines:
            self._name(os.fsdecode(line), globs=False)
        if not lines:
            self.empty.append(label)

    def _read_stdin(self) -> bytes:
        stream = self._stdin or getattr(sys.stdin, "buffer", None)
        if stream is None:
            raise UsageError("- needs a list on stdin, and there is no stdin", "use @FILE for a list in a file")
        data: bytes = stream.read()
        return data

    def _add(self, source: Source, key: str) -> None:
        if source.error:
            key += "\0"  # a name that cannot be (`a.jpg/`) must not hide one that can (`a.jpg`)
        if key not in self._seen:
            self._seen.add(key)
            self.sources.append(source)

    def _folder(self, root: str) -> None:
        """Take the pictures of a folder in the order of their path components, so that a/b comes before a.jpg."""
        key = _key(root)
        way: list[_Open] = []
        found = False
        if self._enter(root, key, root, way):
            return
        while way:
            here = way[-1]
            name, kind = next(here.rest, ("", "end"))
            path, key = os.path.join(here.path, name), _join_key(here.key, name)
            if kind == "end":
                way.pop()
            elif kind == "folder":
                found |= self._enter(path, key, root, way)
            else:
                found = True
                self._add(Source(path, root, error=_broken(path) if kind == "broken" else None), key)
        if not found:
            self.empty.append(root)

    def _enter(self, path: str, key: str, root: str, way: list[_Open]) -> bool:
        """Open a folder for walking. Returns whether it needs no walk: it had one before, or cannot be read.

        A folder that contains itself (a loop of links) is not opened either, and gives nothing.
        """
        if key in self._entered:
            return True
        self._entered.add(key)
        try:
            status = os.stat(path)
            identity = (status.st_dev, status.st_ino)
            if any(identity == above.identity for above in way):
                return False
            with os.scandir(path) as entries:
                wanted = sorted(self._wanted(entries))
        except OSError as error:
            problem = InputError(
                f"cannot read the folder {shown(path)}: {error.strerror}", "check its permissions", kind="unreadable"
            )
            self._add(Source(path, root if path != root else "", error=problem), key)
            return True
        way.append(_Open(path, key, identity, iter(wanted)))
        return False

    def _wanted(self, entries: Iterator[os.DirEntry[str]]) -> Iterator[tuple[str, str]]:
        """Yield name and kind of the entries to take; count the other files."""
        for entry in entries:
            if entry.name.startswith("."):
                continue
            kind = _kind(entry)
            if kind == "folder":
                if self._recursive:
                    yield entry.name, kind
            elif kind != "special" and is_picture_name(entry.name):
                yield entry.name, kind
            else:
                self.ignored += 1


def _kind(entry: os.DirEntry[str]) -> str:
    """Return `folder`, `file`, `special` (a pipe, a device) or `broken` (a link to nothing), links followed."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself, or into a folder that is closed to us
        return "broken"
    return "broken" if entry.is_symlink() and not os.path.exists(entry.path) else "special"


def _key(name: str) -> str:
    """Return what makes a path the same path: absolute, without `.` parts and doubled slashes, links not resolved.

    Only what stands before a `..` is resolved, because `link/..` is not the folder that holds the link.
    """
    if "\0" in name:
        return name
    parts = _split(name)
    if os.pardir in parts:
        after = len(parts) - parts[::-1].index(os.pardir)
        name = os.path.join(os.path.realpath(os.sep.join(parts[:after])), *parts[after:])
    try:
        key = os.path.abspath(name)
    except FileNotFoundError:  # the current folder was removed: nothing relative can exist
        return name
    return key[1:] if key.startswith("//") else key


def _split(path: str) -> list[str]:
    return path.split(os.sep)  # noqa: PTH206 - a Path drops `./` and the slash at the end


def _join_key(folder: str, name: str) -> str:
    return folder + name if folder.endswith(os.sep) else folder + os.sep + name


def _broken(name: str) -> InputError:
    return InputError(f"{shown(name)} is a link to something missing", "repair or remove the link", kind="missing")


def _other_scheme(name: str) -> InputError:
    return InputError(f"cannot fetch {shown(name)}", "only http:// and https:// URLs are read", kind="url")


def _unfound(name: str, problem: OSError | ValueError) -> InputError:
    text = shown(name) or "'' (an empty name)"
    if isinstance(problem, OSError) and problem.errno in (errno.EACCES, errno.EPERM):
        return InputError(f"cannot reach {text}: {problem.strerror}", "check the permissions", kind="unreadable")
    return InputError(f"no such file: {text}", "check the path", kind="missing")


def _read_list(name: str) -> bytes:
    try:
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(
            f"cannot read the list file {shown(name) or '(no name after @)'}: {error.strerror}",
            f"check the path; ./@{shown(name)} is a file of that name",
        ) from error


def _split_list(label: str, data: bytes, null: bool) -> list[bytes]:
    """Return the lines of a list that are not blank, without line ends; spaces belong to the names."""
    data = data.removeprefix(_BOM)
    if null:
        return [line for line in data.split(b"\0") if line]
    if b"\0" in data:
        raise UsageError(
            f"the list {shown(label)} holds NUL bytes", "use -0 if they end its names, else save it as UTF-8"
        )
    lines = []
    for line in data.split(b"\n"):
        name = line.removesuffix(b"\r")
        if name != line and os.path.lexists(line):  # the return belongs to the name
            name = line
        if name:
            lines.append(name)
    return lines


def _matches(pattern: str) -> list[str]:
    """Return what a glob matches, sorted by path components, each once."""
    absolute = pattern[: len(pattern) - len(pattern.lstrip(os.sep))]
    return sorted(set(_expand(absolute, _split(pattern[len(absolute) :]))), key=_split)


def _expand(base: str, parts: list[str]) -> Iterator[str]:
    """Yield the paths below `base` (empty, or ending with a slash) that match the pattern components `parts`."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        yield from _expand_deep(base, rest)
    elif _MAGIC.search(part):
        for name in _names(base, part, folders=bool(rest)):
            if rest:
                yield from _expand(base + name + os.sep, rest)
            else:
                yield base + name
    elif rest:
        yield from _expand(base + part + os.sep if part else base, rest)
    elif os.path.lexists(base + part):  # an empty part, a slash at the end, asks for a folder
        yield base + part


def _expand_deep(base: str, rest: list[str]) -> Iterator[str]:
    """Yield the paths that match `**` and then `rest`; without a `rest` all files and folders."""
    while rest[:1] == ["**"]:
        rest = rest[1:]
    for folder in _folders(base):
        if rest:
            yield from _expand(folder, rest)
        else:
            yield from filter(None, [folder])
            yield from (folder + name for name in _names(folder, "*"))


def _names(folder: str, pattern: str, *, folders: bool = False) -> list[str]:
    """Return the names in `folder` that match one pattern component; with `folders` only those of folders."""
    match = re.compile(fnmatch.translate(pattern)).match
    hidden = pattern.startswith(".")
    try:
        with os.scandir(folder or os.curdir) as entries:
            return [
                entry.name
                for entry in entries
                if (hidden or not entry.name.startswith("."))
                and match(entry.name)
                and (not folders or _kind(entry) == "folder")
            ]
    except OSError:  # as in the shell, what cannot be listed holds no match
        return []


def _folders(base: str) -> Iterator[str]:
    """Yield `base` and the folders below it that are not hidden, each with a slash at its end; links are followed."""
    stack: list[tuple[str, tuple[tuple[int, int], ...]]] = [(base, ())]
    while stack:
        folder, above = stack.pop()
        try:
            status = os.stat(folder or os.curdir)
        except OSError:
            continue
        identity = (status.st_dev, status.st_ino)
        if identity not in above:
            yield folder
            stack.extend((folder + name + os.sep, (*above, identity)) for name in _names(folder, "*", folders=True))
