"""Content hashes of large files, remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dbcap.files import sha256_of, write_atomic

_LARGE = 2**20
"""Bytes. Smaller files are hashed anew each time: that is faster than remembering them."""
_SETTLED = 2.0
"""Seconds. A file changed more recently is not remembered: another change could leave the same time stamps behind."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def content_hash(path: Path, memory: Path) -> str:
    """Return the SHA-256 of a model's file without reading a gigabyte each time.

    A file in the hub's cache is a link to a blob that is named by its hash (checked when it was fetched). For any other
    large file the hash is remembered in the JSON file `memory`, for as long as path, size, inode, modification and
    change time stay what they were; the change time cannot be set back, so an edit is always seen.
    """
    real = path.resolve()
    if is_blob(real):
        return real.name
    state = real.stat()
    if state.st_size < _LARGE:
        return sha256_of(real)
    stamp = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    known = _read(memory)
    entry = known.get(str(real))
    if isinstance(entry, list) and entry[:-1] == stamp:
        return str(entry[-1])
    digest = sha256_of(real)
    if time.time() - state.st_ctime > _SETTLED and real.stat().st_ctime_ns == state.st_ctime_ns:
        known = {name: old for name, old in _read(memory).items() if Path(name).exists()}
        with contextlib.suppress(OSError):  # a folder that cannot be written costs time, nothing else
            write_atomic(memory, json.dumps({**known, str(real): [*stamp, digest]}, indent=1).encode())
    return digest


def is_blob(real: Path) -> bool:
    """Return whether a file is one of the hub's cache that is named by its SHA-256, and so never written to again."""
    return real.parent.name == "blobs" and _SHA256.fullmatch(real.name) is not None


def fingerprint(folder: Path, names: Iterable[str], memory: Path) -> str:
    """Return the SHA-256 over the names and contents of these files of `folder`; where the folder is plays no part."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0{content_hash(folder / name, memory)}\n".encode())
    return digest.hexdigest()


def _read(memory: Path) -> dict[str, Any]:
    """Return what is remembered; a file that cannot be read remembers nothing."""
    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
