"""Files that survive a kill: atomic writes, locks that die with their process, content hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dbcap.errors import DbcapError, LockHeldError, UsageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a file that finds no room."""
_TRIES, _PAUSE = 5, 0.01


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a reader sees the old content or the new, never a part. Creates the folder."""
    with open_atomic(path) as file:
        file.write(data)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that takes the name `path` when the block ends well, and vanishes when it does not.

    A symbolic link keeps being one: its target is replaced. The mode of an existing file is kept.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
    descriptor, temporary = tempfile.mkstemp(prefix=f".{_start_of(target.name)}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno in NO_ROOM and error.filename is None:
            error.filename = os.fspath(path)  # writing says that there is no room, but not where
        raise
    sync_folder(target.parent)


def _start_of(name: str) -> str:
    """Return so much of a file name that another fits around it: names are limited in bytes."""
    return os.fsencode(name)[:100].decode("utf-8", "ignore")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can do that."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse to sync a folder
        pass
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make all below a folder, and that it is there, survive a power cut."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as written:
                os.fsync(written.fileno())
    sync_folder(folder)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_stdout(data: bytes) -> None:
    """Write data to stdout at once. Raises BrokenPipeError when the reader has gone, DbcapError when nothing can be."""
    if sys.stdout is None:
        raise DbcapError("stdout is closed", "send it to a file or to /dev/null")
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DbcapError(f"cannot write to stdout: {error.strerror}", "make room, or send it elsewhere") from error


class Lock:
    """An exclusive lock on the file `path`, released by the system when the process dies.

    Use as a context manager. Raises `LockHeldError` at once when somebody else holds it. With `remove` the file goes
    when the lock is released; a process that is killed leaves it behind, which does no harm.
    """

    def __init__(self, path: Path, *, remove: bool = False, hint: str = "") -> None:
        self.path = path
        self._remove, self._hint = remove, hint or "wait for it to end, or choose another output"
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Lock:
        while self._file is None:
            file = self._open()
            if _same_file(file, self.path):
                self._file = file
            else:  # the holder before us removed the file that we had opened: a lock on it would lock nobody out
                file.close()
        return self

    def _open(self) -> IO[bytes]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab")
        except OSError as error:
            message = f"cannot open the lock file {self.path}: {error.strerror}"
            raise UsageError(message, "write to another place") from error
        for _ in range(_TRIES):  # somebody may have it for the moment in which he looks whether it is held
            try:
                if sys.platform == "win32":
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(_PAUSE)
            else:
                return file
        file.close()
        raise LockHeldError(f"another dbcap is at work here: it holds {self.path}", self._hint)

    def __exit__(self, *exc: object) -> None:
        if self._file:
            if self._remove and sys.platform != "win32":
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def is_locked(path: Path) -> bool:
    """Return whether somebody holds the lock on the file `path`; several may look at once."""
    if not path.exists():
        return False
    if sys.platform == "win32":
        try:
            with Lock(path):
                return False
        except LockHeldError:
            return True
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def lock_beside(path: Path) -> Lock:
    """Return the lock of the file `path`: `.NAME.lock` beside it, hidden and gone at the end, to be in nobody's way."""
    return Lock(path.with_name(f".{path.name}.lock"), remove=True)


def _same_file(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def working_folder() -> str:
    """Return the current folder. Raises UsageError when it has been deleted: neither names nor torch work there."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise UsageError("the current folder does not exist any more", "change to another") from None


def folder_size(folder: Path) -> tuple[int, int]:
    """Return the number of files below a folder and their bytes; a link counts as nothing."""
    sizes = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # somebody else at work may remove a file of theirs
                state = os.lstat(os.path.join(parent, name))
                sizes += [state.st_size] * stat.S_ISREG(state.st_mode)
    return len(sizes), sum(sizes)


def in_units(size: int) -> str:
    """Show a number of bytes as people read it: 983 MB."""
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}"
