"""The word that a DreamBooth model was taught, and the word for its class: what `[V]` and `{class}` stand for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dbcap.errors import ModelError, UsageError
from dbcap.models.pipelines import IDENTITY

HEADER = "dbcap"
"""The key in a safetensors file's header that holds the same JSON document as a model folder's file."""


@dataclass(frozen=True)
class Identity:
    """What a model or a file says of itself; None where it says nothing."""

    identifier: str | None = None
    class_word: str | None = None

    def document(self) -> dict[str, str | None]:
        """Return what files hold of it."""
        return {"identifier": self.identifier, "class": self.class_word}


def of_folder(folder: Path) -> Identity:
    """Read a model folder. Raises ModelError for a damaged file."""
    path = folder / IDENTITY
    return _parsed(path.read_bytes(), str(path)) if path.is_file() else Identity()


def of_header(path: Path) -> Identity:
    """Read the header of a safetensors file. Raises ModelError for a damaged one."""
    try:
        with safe_open(path, "numpy") as file:
            said = (file.metadata() or {}).get(HEADER)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "it must be a whole .safetensors file") from error
    return _parsed(said, str(path)) if said else Identity()


def agreed(found: Iterable[tuple[str, Identity]]) -> Identity:
    """Return what all that say something say. Raises UsageError, naming both, where two differ."""
    words: dict[str, tuple[str, str]] = {}
    for where, one in found:
        for name, word in (("identifier", one.identifier), ("class word", one.class_word)):
            if word is None:
                continue
            first, before = words.setdefault(name, (where, word))
            if before != word:
                raise UsageError(
                    f"the {name} of {first} is {before!r}, and that of {where} {word!r}", "write the word itself"
                )
    return Identity(*(words[name][1] if name in words else None for name in ("identifier", "class word")))


def _parsed(document: str | bytes, where: str) -> Identity:
    try:
        said: Any = json.loads(document)
        words = [said.get("identifier"), said.get("class")]
        sound = all(word is None or isinstance(word, str) for word in words)
    except (ValueError, AttributeError):
        sound = False
    if not sound:
        what = f"what {where} says of its identifier and class is damaged"
        raise ModelError(what, "fetch or copy it again, or write it anew")
    return Identity(*words)
