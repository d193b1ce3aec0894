"""Photos of a subject: found, read, looked over and brought to size."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from dbcap import images, inputs
from dbcap.config.training import PreparingConfig
from dbcap.dataset import checks, crops, store
from dbcap.dataset.checks import Print
from dbcap.errors import DbcapError, InputError, UsageError
from dbcap.events import Events
from dbcap.files import write_atomic
from dbcap.images import Picture
from dbcap.inputs import Source, shown


@dataclass
class Shot:
    """A photo that was read. `warnings` grow as it is looked over."""

    name: str
    """Of its file; where another has the same name, the path that the user gave."""
    origin: str
    """Its absolute path."""
    sha256: str
    """Of the file."""
    width: int
    height: int
    image: Image.Image
    """Brought to size."""
    prints: tuple[Print, Print]
    warnings: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """Where it lies."""
        return Path(self.origin)


@dataclass(frozen=True)
class Shots:
    """What came of all photos."""

    good: list[Shot]
    failed: int
    duplicates: int
    """Left out as --drop-duplicates says."""


def find(arguments: Sequence[str], events: Events) -> list[Source]:
    """Return the photos that arguments name. Raises UsageError where there is none."""
    found = inputs.discover(arguments, stdin=getattr(sys.stdin, "buffer", None))
    if not found.sources:
        raise UsageError(
            f"there are no photos in {', '.join(map(shown, arguments))}", "name photos, or folders of them"
        )
    for name in found.empty:
        events.say(f"{shown(name)}: no photos there")
    return found.sources


def read(sources: Sequence[Source], config: PreparingConfig, size: int, events: Events) -> Shots:
    """Read photos, look them over and bring them to size; those that cannot be read are reported and left out.

    Raises DbcapError where none can be.
    """
    good: list[Shot] = []
    failed = duplicates = 0
    names = Counter(os.path.basename(one.name) for one in sources)
    with events.track("Reading photos", len(sources)) as tracker:
        for source in sources:
            try:
                base = os.path.basename(source.name)
                shot = _read(source, base if names[base] == 1 else source.name, config, size)
            except InputError as error:
                failed += 1
                events.fail(about(source, error))
                tracker.fail()
                continue
            tracker.advance()
            if twin := checks.near(shot.prints, [one.prints for one in good]):
                first = good[twin[0]].name
                what = f"nearly the same as {shown(first)}{', mirrored' if twin[1] else ''}"
                if config.drop_duplicates:
                    duplicates += 1
                    events.say(f"left out {shown(shot.name)}: {what}")
                    continue
                shot.warnings.append(what)
            good.append(shot)
    if not good:
        raise DbcapError(f"none of {len(sources)} photos can be read", "see above what is wrong with each")
    return Shots(good, failed, duplicates)


def brought_to_size(source: Source, crop: str, size: int, folder: Path) -> Path:
    """Return a copy of a photo of the class, made in `folder` unless it is there. Raises InputError."""
    picture = _picture(source, images.DEFAULT_MAX_PIXELS)
    path = folder / f"{picture.sha256}.png"
    if not path.is_file():
        write_atomic(path, store.png_of(crops.cropped(picture.image, crop, size)))
    return path


def _picture(source: Source, max_pixels: int) -> Picture:
    if source.error:
        raise source.error
    if source.is_url:
        raise InputError("is a URL, and photos are files", "fetch it first", kind="url")
    return images.read(source.name, max_pixels=max_pixels)


def _read(source: Source, name: str, config: PreparingConfig, size: int) -> Shot:
    picture = _picture(source, config.max_pixels)
    return Shot(
        name,
        os.path.abspath(source.name),
        picture.sha256,
        picture.width,
        picture.height,
        crops.cropped(picture.image, config.crop, size),
        checks.prints_of(picture.image),
        checks.doubts(picture.image, size, config.crop),
    )


def about(source: Source, error: InputError) -> str:
    """Return one line about a photo that failed."""
    name = shown(source.name)
    return str(error) if name in error.message else f"{name}: {error}"
