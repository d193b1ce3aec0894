"""One image to make: all that decides it, the key that stands for that, and its file name."""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dbcap.errors import DbcapError, UsageError, did_you_mean
from dbcap.inputs import shown

LONGEST_NAME = 255
"""Bytes, of a file name on most file systems."""
MOST_SEED = 2**64 - 1
_FIXED = ("negative", "guidance")
"""Fields that always stand in the key; others only where they hold something, so that new fields leave old keys."""
_NUMBERS = ("guidance", "guidance_rescale", "eta", "strength")
_SPEC = re.compile(r"(.?[<>=^])?[-+ ]?#?0?\d{0,3}[_,]?(\.\d{1,3})?[sdbxXo]?")
_FIELDS = ("index", "seed", "prompt", "date", "run", "step")


class UnfitError(DbcapError):
    """A picture was made that is not to be written."""


@dataclass(frozen=True)
class Job:
    """One image. What is here decides its pixels, but for device, number format, batch shape and threads."""

    model: str
    """SHA-256 over the weights and configuration."""
    prompt: str
    negative: str
    seed: int
    width: int
    height: int
    scheduler: str
    steps: int
    guidance: float
    guidance_rescale: float = 0.0
    eta: float = 0.0
    long_prompt: str = "truncate"
    init: str = ""
    """SHA-256 of the picture that it begins with; as the mask's, empty where there is none."""
    mask: str = ""
    strength: float = 1.0
    additions: tuple[tuple[str, float], ...] = ()
    """SHA-256 and scale of LoRA and embedding files, in order."""

    @property
    def key(self) -> str:
        """What stands for all of it: 64 hexadecimal digits."""
        values = asdict(self)
        values |= {name: float(values[name]) + 0.0 for name in _NUMBERS}  # 7 is 7.0, and -0.0 is 0.0
        values["additions"] = [(digest, float(scale) + 0.0) for digest, scale in self.additions]
        values = {name: value for name, value in values.items() if value or name in _FIXED}
        text = json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def slug(text: str, most: int = 60) -> str:
    """Return a prompt as a part of a file name: letters, digits and single dashes."""
    plain = unicodedata.normalize("NFKC", text).lower()
    words = "".join(letter if letter.isalnum() else "-" for letter in plain)
    short = re.sub("-+", "-", words).strip("-").encode()[:most].decode("utf-8", "ignore").strip("-")
    return short or "image"


def check_template(template: str) -> None:
    """Raise UsageError for a `--name` that cannot make file names inside the folder."""
    try:
        parts = [(name, spec or "") for _, name, spec, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UsageError(f"--name {template!r} cannot be read: {error}", "write braces twice to mean them") from None
    fields = [name for name, _ in parts]
    for name, spec in parts:
        if name not in _FIELDS:
            near = did_you_mean(name, _FIELDS)
            raise UsageError(f"--name has no field {{{shown(name)}}}", near or f"there are {', '.join(_FIELDS)}")
        if not _SPEC.fullmatch(spec):  # also fields inside of it, and widths that would fill the memory
            raise UsageError(f"--name: {{{name}:{shown(spec)}}} has no format for file names", "try {index:05d}")
    if "seed" not in fields and "index" not in fields:
        raise UsageError("--name gives all images one name", "let it hold {index} or {seed}")
    named(template, dict.fromkeys(_FIELDS, "x") | {"index": 0, "seed": 0, "step": 0})


def named(template: str, fields: Mapping[str, Any]) -> str:
    """Return the file name, without its ending. Raises UsageError for one that would leave the folder."""
    try:
        name = template.format(**fields)
    except (ValueError, IndexError, AttributeError, KeyError) as error:
        raise UsageError(f"--name {template!r} cannot be filled in: {error}") from None
    outside = "/" in name or (os.sep != "/" and os.sep in name)
    unfit = any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)  # controls, and what is no UTF-8
    if not name or outside or unfit or name.startswith("."):
        raise UsageError(f"--name gives {name!r}, which is no plain file name", "use --out for the folder")
    return name


def fitting(name: str, suffix: str) -> str:
    """Return name + suffix, the name cut so that both take `LONGEST_NAME` bytes at most."""
    room = LONGEST_NAME - len(suffix.encode())
    return name.encode()[:room].decode("utf-8", "ignore") + suffix
